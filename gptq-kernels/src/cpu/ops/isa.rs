//! Compiles a generic row function once per instruction set and picks one at run time.
//!
//! The bodies are plain loops over fixed-size lanes; the compiler vectorises them for the features named here. The
//! arithmetic of one instruction set is the same on every machine that has it.

/// How a product is added to a sum.
pub(super) trait MulAdd {
    /// `a * b + c`
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// One rounding, where the instruction exists. (Without it `f32::mul_add` is a slow library call.)
pub(super) struct Fused;

/// Two roundings.
pub(super) struct Separate;

impl MulAdd for Fused {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl MulAdd for Separate {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

/// Makes `$name` from the `#[inline(always)]` function `$body<I: MulAdd>`.
macro_rules! multiversion {
    ($(#[$attr:meta])* $vis:vis fn $name:ident = $body:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?) => {
        $(#[$attr])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    $body::<$crate::cpu::ops::isa::Fused>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    $body::<$crate::cpu::ops::isa::Fused>($($arg),*)
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    if is_x86_feature_detected!("avx512f")
                        && is_x86_feature_detected!("avx512bw")
                        && is_x86_feature_detected!("avx512dq")
                        && is_x86_feature_detected!("avx512vl")
                    {
                        // SAFETY: the function's only requirement is that the CPU has the features that it is
                        // compiled for, and each of them has just been detected.
                        return unsafe { avx512($($arg),*) };
                    }
                    // SAFETY: as above, for avx2 and fma.
                    return unsafe { avx2($($arg),*) };
                }
                $body::<$crate::cpu::ops::isa::Separate>($($arg),*)
            }
            #[cfg(target_arch = "aarch64")]
            {
                $body::<$crate::cpu::ops::isa::Fused>($($arg),*)
            }
            #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
            {
                $body::<$crate::cpu::ops::isa::Separate>($($arg),*)
            }
        }
    };
}

pub(super) use multiversion;
