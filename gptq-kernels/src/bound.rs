/// The unit roundoff of float32, `2^-24`.
const UNIT_F32: f64 = 1.0 / (1u64 << 24) as f64;

/// How far a computed output may be from the exact one.
///
/// For one output element with exact value `y = sum_i x_i w_i + b` and magnitude `m = sum_i |x_i w_i| + |b|`, a kernel
/// promises
///
/// ```text
/// |computed - y| <= relative * m + output * |y| + absolute * sum_i (1 + |x_i|) |w_i| + floor
/// ```
///
/// `relative` covers roundings of activations and of the accumulation, `output` the rounding to the element type of the
/// device's buffers, `absolute` what is flushed to zero or lost to subnormals on the way, `floor` the same of the result. It is the standard model of Higham,
/// *Accuracy and Stability of Numerical Algorithms*, chapters 2 and 3.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ErrorBound {
    /// Relative to the sum of magnitudes.
    pub relative: f64,
    /// Relative to the result.
    pub output: f64,
    /// Absolute, per unit of weight.
    pub absolute: f64,
    /// Absolute: half the distance of the subnormal numbers of the element type.
    pub floor: f64,
}

impl ErrorBound {
    /// An accumulation in float32 in which no product passes through more than `roundings` roundings:
    /// `gamma_n = n u / (1 - n u)` with `u = 2^-24`.
    ///
    /// Subnormal products are rounded to multiples of `2^-149`, or flushed below `2^-126` by hardware that does so;
    /// `absolute` allows the latter.
    pub fn float32(roundings: usize) -> Self {
        let nu = roundings as f64 * UNIT_F32;
        Self { relative: nu / (1.0 - nu), output: 0.0, absolute: f64::from(f32::MIN_POSITIVE), floor: 0.0 }
    }

    /// Adds a relative error of each activation: its rounding to a shorter type.
    #[must_use]
    pub fn with_activation_error(mut self, relative: f64) -> Self {
        self.relative += relative * (1.0 + self.relative);
        self
    }

    /// Adds the rounding of the result to an element type with unit roundoff `unit`, which among subnormal numbers is an
    /// absolute error of at most `floor`.
    #[must_use]
    pub fn with_output_error(mut self, unit: f64, floor: f64) -> Self {
        self.output += unit;
        self.floor += floor;
        self.relative *= 1.0 + unit;
        self
    }

    /// The bound for one element of `magnitude = sum |x w| + |b|`, exact value `y` and
    /// `weight_sum = sum (1 + |x|) |w|`.
    pub fn of(&self, magnitude: f64, y: f64, weight_sum: f64) -> f64 {
        self.relative * magnitude + self.output * y.abs() + self.absolute * weight_sum + self.floor
    }
}
