//! Registers of PTX by their distance from the newest one, so that loop bodies that were written out look alike and an archive of
//! images becomes smaller (a quarter of those of `cuda-wgmma-sm90`).
//!
//! NVRTC numbers the registers of each type in the order in which it comes to them. `%r7` is written `%r+` where it is the next
//! of its type, `%r-3` where the next one would be `%r10`, and as it is where neither holds. Each kernel begins anew. `generate_ptx`
//! shares this file.

use std::collections::HashMap;

/// Where a kernel begins.
const ENTRY: &str = ".entry ";

/// The next number of each type of registers.
type Next<'a> = HashMap<&'a str, u32>;

/// Writes registers by their distance, as only the example does.
#[cfg_attr(not(test), allow(dead_code))]
pub(super) fn relative(ptx: &str) -> Option<String> {
    rewrite(ptx, |next, class, written| {
        let number: u32 = written.parse().ok()?;
        let newest = next.entry(class).or_default();
        let distance = newest.checked_sub(number);
        *newest = (*newest).max(number.checked_add(1)?);
        Some(match distance {
            Some(0) => "+".to_owned(),
            Some(distance) => format!("-{distance}"),
            None => written.to_owned(),
        })
    })
}

/// The opposite of [`relative`]; `None` for what it cannot have made.
pub(super) fn absolute(text: &str) -> Option<String> {
    rewrite(text, |next, class, written| {
        let newest = next.entry(class).or_default();
        let number = match written.strip_prefix('-') {
            Some(distance) => newest.checked_sub(distance.parse().ok()?)?,
            None if written == "+" => *newest,
            None => written.parse().ok()?,
        };
        *newest = (*newest).max(number.checked_add(1)?);
        Some(number.to_string())
    })
}

/// Replaces what follows `%` and lower-case letters, if it is `+`, or digits with or without a minus.
fn rewrite<'a>(
    text: &'a str,
    mut number: impl FnMut(&mut Next<'a>, &'a str, &str) -> Option<String>,
) -> Option<String> {
    let mut out = String::with_capacity(text.len() * 2);
    let mut next = Next::new();
    for line in text.split_inclusive('\n') {
        if line.contains(ENTRY) {
            next.clear();
        }
        let mut pieces = line.split('%');
        out.push_str(pieces.next()?);
        for piece in pieces {
            let (class, rest) = piece.split_at(piece.bytes().take_while(u8::is_ascii_lowercase).count());
            let digits_from = usize::from(rest.starts_with('-'));
            let digits = rest.bytes().skip(digits_from).take_while(u8::is_ascii_digit).count();
            let written = match digits {
                0 => usize::from(rest.starts_with('+')),
                _ => digits_from + digits,
            };
            let (written, rest) = rest.split_at(written);
            out.push('%');
            out.push_str(class);
            if !class.is_empty() && !written.is_empty() {
                out.push_str(&number(&mut next, class, written)?);
            } else {
                out.push_str(written);
            }
            out.push_str(rest);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bodies_that_were_written_out_look_alike() {
        let ptx = ".entry a(\nmov.u32 %r1, %tid.x;\nadd.s32 %r2, %r1, %r1;\nadd.s32 %r3, %r2, %r2;\n\
                   ld.u32 %r4, [%rd1+16];\n.entry b(\nmov.u32 %r1, %clock;\n.reg .b32 %r<5>;\n";
        let text = ".entry a(\nmov.u32 %r1, %tid.x;\nadd.s32 %r+, %r-2, %r-2;\nadd.s32 %r+, %r-2, %r-2;\n\
                    ld.u32 %r+, [%rd1+16];\n.entry b(\nmov.u32 %r1, %clock;\n.reg .b32 %r<5>;\n";
        assert_eq!(relative(ptx).as_deref(), Some(text));
        assert_eq!(absolute(text).as_deref(), Some(ptx));
    }

    #[test]
    fn what_no_ptx_can_be_is_refused() {
        for text in ["%r-1", "%r4294967295", "%r99999999999", "%r0, %r-2"] {
            assert_eq!(absolute(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_is_lost(
            ptx in r"(\.entry |%[a-z]{1,2}(0|[1-9][0-9]{0,2})|%[a-z]{1,2}[.<]|[ ,+-]|\n|[é\[\]]){0,60}",
        ) {
            let text = relative(&ptx).unwrap();
            prop_assert_eq!(absolute(&text), Some(ptx));
        }
    }
}
