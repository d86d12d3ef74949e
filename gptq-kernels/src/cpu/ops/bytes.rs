//! One head's key or value as bytes and a scale: the rounding of [`KvFormat::Int8`](crate::KvFormat::Int8).

/// Magnitudes below count as zero: the quotient of 127 and them might not be finite.
const LEAST: f32 = 1.0 / (1u128 << 100) as f32;

/// Scale, and what features are multiplied with before they are rounded. A head that is not finite gets a scale that is not.
pub(super) fn grid(head: &[f32]) -> (f32, f32) {
    // Bits without the sign order as the numbers do, NaN above all.
    let largest = head.iter().map(|x| x.abs().to_bits()).max().map_or(0.0, f32::from_bits);
    if largest < LEAST { (0.0, 0.0) } else { (largest / 127.0, 127.0 / largest) }
}

pub(super) fn code(x: f32, inverse: f32) -> i8 {
    (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_feature_moves_by_more_than_half_a_step(
            head in prop::collection::vec(-1.0f32..1.0, 1..130), exponent in -90i32..120,
        ) {
            let head: Vec<f32> = head.iter().map(|x| x * 2f32.powi(exponent)).collect();
            let (scale, inverse) = grid(&head);
            // The product is at most 127 and has three roundings: of both quotients and its own.
            let bound = (0.5 + 127.0 * 3.0 * 2f64.powi(-24)) * f64::from(scale);
            for &x in &head {
                let read = f64::from(code(x, inverse)) * f64::from(scale);
                prop_assert!((read - f64::from(x)).abs() <= bound, "{x} {read} {scale}");
            }
        }
    }

    #[test]
    fn what_is_not_ordinary() {
        assert_eq!(grid(&[]), (0.0, 0.0));
        assert_eq!(grid(&[0.0, -0.0]), (0.0, 0.0));
        assert_eq!(grid(&[LEAST / 2.0, -1e-40]), (0.0, 0.0));
        assert!(grid(&[1.0, f32::NAN, 2.0]).0.is_nan());
        assert_eq!(grid(&[1.0, f32::NEG_INFINITY]).0, f32::INFINITY);
        let (scale, inverse) = grid(&[1.0, -127.0, 0.5, 1.5, -2.5]);
        assert_eq!((scale, inverse), (1.0, 1.0));
        assert_eq!([1.0, -127.0, 0.5, 1.5, -2.5].map(|x| code(x, inverse)), [1, -127, 0, 2, -2]);
    }
}
