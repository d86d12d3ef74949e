//! The PTX images that ship with the crate.
//!
//! `cuda/*.cu` are compiled by `examples/generate_ptx.rs` into `cuda/ptx/`, which is included here, so that a user needs
//! nothing but the driver. `cuda/ptx/manifest.txt` holds the SHA-256 of every source and every image; the tests of this
//! module fail if either is stale or an entry point is missing.

/// One PTX image.
#[derive(Debug)]
pub(super) struct Image {
    /// Its name, also that of its file.
    pub(super) name: &'static str,
    /// The PTX, with a NUL at the end.
    pub(super) ptx: &'static str,
    /// The kernels in it.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(super) entries: &'static [&'static str],
}

macro_rules! images {
    ($($entries:expr => $($name:literal)*;)*) => {
        /// All images.
        pub(super) static IMAGES: &[Image] = &[$($(Image {
            name: $name,
            ptx: concat!(include_str!(concat!("../../cuda/ptx/", $name, ".ptx")), "\0"),
            entries: $entries,
        },)*)*];
    };
}

images! {
    &["plain"] =>
        "plain-f16-2" "plain-f16-3" "plain-f16-4" "plain-f16-8"
        "plain-bf16-2" "plain-bf16-3" "plain-bf16-4" "plain-bf16-8";
    &["gemv_1_1x16_2", "gemv_1_1x16_3", "gemv_1_2x8_2"] =>
        "gemv-f16-g128-sym" "gemv-f16-g128-asym" "gemv-f16-g64-sym" "gemv-f16-g64-asym"
        "gemv-f16-g32-sym" "gemv-f16-g32-asym"
        "gemv-bf16-g128-sym" "gemv-bf16-g128-asym" "gemv-bf16-g64-sym" "gemv-bf16-g64-asym"
        "gemv-bf16-g32-sym" "gemv-bf16-g32-asym";
}

/// The image of that name.
pub(super) fn find(name: &str) -> Option<&'static Image> {
    IMAGES.iter().find(|image| image.name == name)
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn images_are_made_from_these_sources() {
        let cuda = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        let manifest = fs::read_to_string(cuda.join("ptx/manifest.txt")).unwrap();
        let mut listed = 0;
        for line in manifest.lines().filter(|line| !line.starts_with('#')) {
            let (hash, file) = line.split_once("  ").unwrap();
            let got: String = Sha256::digest(fs::read(cuda.join(file)).unwrap())
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect();
            assert_eq!(got, hash, "{file} has changed: run the generator, see cuda/README.md");
            listed += 1;
        }
        let sources = fs::read_dir(&cuda).unwrap().filter_map(Result::ok).filter(|file| {
            file.path().extension().is_some_and(|extension| extension == "cu" || extension == "cuh")
        });
        assert_eq!(listed, sources.count() + IMAGES.len());
    }

    #[test]
    fn images_have_their_entry_points_and_are_small() {
        for image in IMAGES {
            for entry in image.entries {
                assert!(image.ptx.contains(&format!(".entry {entry}(")), "{}: no {entry}", image.name);
            }
            assert_eq!(image.ptx.matches(".entry ").count(), image.entries.len(), "{}", image.name);
            assert!(image.ptx.contains(".version 8.0"), "{}", image.name);
        }
        assert!(IMAGES.iter().map(|image| image.ptx.len()).sum::<usize>() < 2 << 20);
    }
}
