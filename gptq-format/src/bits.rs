/// Width of one quantised code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Bits {
    /// 2 bits, codes 0..=3
    B2 = 2,
    /// 3 bits, codes 0..=7
    B3 = 3,
    /// 4 bits, codes 0..=15
    B4 = 4,
    /// 5 bits, codes 0..=31; on disk only as `gptq_p`
    B5 = 5,
    /// 6 bits, codes 0..=63; on disk only as `gptq_p`
    B6 = 6,
    /// 7 bits, codes 0..=127; on disk only as `gptq_p`
    B7 = 7,
    /// 8 bits, codes 0..=255
    B8 = 8,
}

impl Bits {
    /// Every width of the format.
    pub const ALL: [Bits; 7] = [Bits::B2, Bits::B3, Bits::B4, Bits::B5, Bits::B6, Bits::B7, Bits::B8];

    /// The width as a number: 2 to 8.
    pub const fn get(self) -> u32 {
        self as u32
    }

    /// The largest code, `2^bits - 1`.
    pub const fn max_code(self) -> u8 {
        ((1u32 << self.get()) - 1) as u8
    }

    /// Whether `gptq_p` is the only layout on disk for this width: 5, 6 and 7 bits.
    pub const fn is_planar_only(self) -> bool {
        matches!(self, Self::B5 | Self::B6 | Self::B7)
    }

    /// Number of 32-bit words that hold `len` codes: `ceil(len * bits / 32)`.
    pub const fn words(self, len: usize) -> usize {
        (len * self.get() as usize).div_ceil(32)
    }
}

impl TryFrom<u32> for Bits {
    type Error = u32;

    fn try_from(value: u32) -> Result<Self, u32> {
        Self::ALL.into_iter().find(|bits| bits.get() == value).ok_or(value)
    }
}
