//! What the layouts of the kernels have in common.

use gptq_format::PackedLinear;

use crate::Epilogue;

/// Which feature of a layer is at place `packed` of its tiles; `None` for padding. The two features that
/// [`Epilogue::SiluMul`] multiplies are 8 places apart.
pub(super) fn feature_at(packed: usize, outputs: usize, epilogue: Epilogue) -> Option<usize> {
    match epilogue {
        Epilogue::Store | Epilogue::Add => Some(packed).filter(|&feature| feature < outputs),
        Epilogue::SiluMul => {
            let pair = packed / 16 * 8 + packed % 8;
            Some(pair + packed % 16 / 8 * (outputs / 2)).filter(|_| pair < outputs / 2)
        }
    }
}

/// Places that the features of a layer take, before padding to tiles.
pub(super) fn places(outputs: usize, epilogue: Epilogue) -> usize {
    match epilogue {
        Epilogue::Store | Epilogue::Add => outputs,
        Epilogue::SiluMul => (outputs / 2).next_multiple_of(8) * 2,
    }
}

/// How codes and zeros are stored: in 4 bits or 8, and whether zeros are, which otherwise are the middle of these codes.
pub(super) fn stored(weight: &PackedLinear) -> (usize, bool) {
    let bits = weight.bits().get() as usize;
    let stored = if bits <= 4 { 4 } else { 8 };
    (stored, !weight.is_symmetric() || bits != stored)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_has_one_place() {
        for epilogue in [Epilogue::Store, Epilogue::SiluMul] {
            for outputs in [2, 16, 30, 64, 70] {
                let mut features: Vec<_> = (0..2 * outputs + 16)
                    .filter_map(|packed| feature_at(packed, outputs, epilogue))
                    .collect();
                features.sort_unstable();
                assert!(features.into_iter().eq(0..outputs), "{outputs} {epilogue:?}");
                let places = places(outputs, epilogue);
                assert!((places..places + 64).all(|packed| feature_at(packed, outputs, epilogue).is_none()));
            }
        }
        assert_eq!(feature_at(8, 64, Epilogue::SiluMul), Some(32));
        assert_eq!(feature_at(16, 64, Epilogue::SiluMul), Some(8));
    }
}
