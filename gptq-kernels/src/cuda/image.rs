//! The PTX images that ship with the crate.
//!
//! `cuda/*.cu` are compiled by `examples/generate_ptx.rs` into `cuda/ptx/` and included here, so that a user needs nothing
//! but the driver. The images of one source are a family: one archive, compressed by LZMA because images of a family say
//! the same with other types, and a manifest that holds the SHA-256 of every source file and of the archive. The tests of
//! this module fail if either is stale or an entry point is missing.
//!
//! An archive is a sequence of images: name, space, length in bytes, line feed, PTX. After ` relative` behind the length, the
//! PTX has its registers numbered as [`registers`] says.

use std::io::{BufRead, BufReader, Read};

use lzma_rust2::LzmaReader;

use super::registers;

/// One PTX image.
#[derive(Debug)]
pub(super) struct Image {
    /// Its name.
    pub(super) name: &'static str,
    /// The archive of its family.
    archive: &'static [u8],
    /// What the archive was made of, and its hash.
    manifest: &'static str,
    /// The family, and the kernels in it.
    family: &'static str,
    #[cfg_attr(not(test), allow(dead_code))]
    entries: &'static [&'static str],
}

/// More than any image has.
const MOST_BYTES: usize = 4 << 20;
/// Memory that unpacking may take, in KiB: a dictionary of 8 MiB, and little else.
const MOST_MEMORY: u32 = 16 << 10;

impl Image {
    /// The PTX; `None` if the archive is damaged.
    pub(super) fn ptx(&self) -> Option<String> {
        let mut archive = BufReader::new(LzmaReader::new_mem_limit(self.archive, MOST_MEMORY, None).ok()?);
        loop {
            let mut header = String::new();
            archive.read_line(&mut header).ok()?;
            let mut words = header.split_whitespace();
            let name = words.next()?;
            let len = words.next()?.parse().ok().filter(|&len| len <= MOST_BYTES)?;
            let mut text = vec![0; len];
            archive.read_exact(&mut text).ok()?;
            if name == self.name {
                let text = String::from_utf8(text).ok()?;
                return match words.next() {
                    None => Some(text),
                    Some("relative") => registers::absolute(&text),
                    Some(_) => None,
                };
            }
        }
    }
}

macro_rules! images {
    ($($family:literal $entries:expr => $($name:literal)*;)*) => {
        /// All images.
        pub(super) static IMAGES: &[Image] = &[$($(Image {
            name: $name,
            archive: include_bytes!(concat!("../../cuda/ptx/", $family, "/images.lzma")),
            manifest: include_str!(concat!("../../cuda/ptx/", $family, "/manifest.txt")),
            family: $family,
            entries: $entries,
        },)*)*];
    };
}

const OPS: &[&str] = &[
    "embed",
    "rms_norm",
    "add_rms_norm",
    "rms_norm_ordered",
    "add_rms_norm_ordered",
    "reorder",
    "add",
    "silu_mul",
    "gather",
    "draw_greedy",
    "draw_sampled",
    "rope_append",
];
const ATTENTION: &[&str] = &["attention_prefill", "attention_decode"];
const DECODE8: &[&str] = &["attention_decode"];

images! {
    "plain" &["plain"] =>
        "plain-f16-2" "plain-f16-3" "plain-f16-4" "plain-f16-8"
        "plain-bf16-2" "plain-bf16-3" "plain-bf16-4" "plain-bf16-8";
    "dense" &["dense", "add_bias"] =>
        "dense-f16-f16" "dense-f16-bf16" "dense-f16-f32" "dense-bf16-f16" "dense-bf16-bf16" "dense-bf16-f32";
    "dense90" &["dense", "add_bias"] => "dense90-f16" "dense90-bf16";
    "wgmma" &["wgmma_16_2x1", "wgmma_16_2x2", "wgmma_32_2x1", "wgmma_64_3x1", "wgmma_64_2x2", "wgmma_128_2x1",
        "wgmma_many_256_2", "wgmma_many_128_2", "wgmma_many_128_3", "order"] =>
        "wgmma-f16-g128-sym" "wgmma-f16-g128-asym" "wgmma-f16-g64-sym" "wgmma-f16-g64-asym"
        "wgmma-f16-g32-sym" "wgmma-f16-g32-asym"
        "wgmma-bf16-g128-sym" "wgmma-bf16-g128-asym" "wgmma-bf16-g64-sym" "wgmma-bf16-g64-asym"
        "wgmma-bf16-g32-sym" "wgmma-bf16-g32-asym";
    "quantize" &[
        "add_span", "finish_sum", "add_squares", "set_diagonal", "difference_f16", "difference_bf16", "difference_f32", "gather_matrix", "factor_leaf",
        "reverse_matrix", "scale_triangle", "fit_grid", "search_grid", "gather_weight_f32", "gather_weight_f16",
        "gather_weight_bf16", "zero_columns", "columns_gptq", "columns_gptaq", "update_gptq", "update_gptaq", "dequantize_f16", "dequantize_bf16",
        "dequantize_f32", "pack_codes", "pack_grids",
    ] => "quantize";
    "single" &[
        "embed", "rms_norm", "add", "add_bias", "silu_mul", "gather", "rope_append", "split_f32", "split_f16", "split_bf16",
        "attention_64", "attention_128", "attention_256",
    ] => "single";
    "gemv" &["gemv_1x16_2", "gemv_2x8_2"] =>
        "gemv-f16-g128-sym" "gemv-f16-g128-asym" "gemv-f16-g64-sym" "gemv-f16-g64-asym"
        "gemv-f16-g32-sym" "gemv-f16-g32-asym"
        "gemv-bf16-g128-sym" "gemv-bf16-g128-asym" "gemv-bf16-g64-sym" "gemv-bf16-g64-asym"
        "gemv-bf16-g32-sym" "gemv-bf16-g32-asym";
    "gemv-block" &["block_1x16_2", "block_2x8_2", "columns_1x16_2", "columns_2x8_2"] =>
        "gemv-block-f16-g128-sym" "gemv-block-f16-g128-asym" "gemv-block-f16-g64-sym" "gemv-block-f16-g64-asym"
        "gemv-block-f16-g32-sym" "gemv-block-f16-g32-asym"
        "gemv-block-bf16-g128-sym" "gemv-block-bf16-g128-asym" "gemv-block-bf16-g64-sym" "gemv-block-bf16-g64-asym"
        "gemv-block-bf16-g32-sym" "gemv-block-bf16-g32-asym";
    "exllama" &["exllama_1", "exllama_2", "exllama_4", "exllama_8"] =>
        "exllama-f16-4" "exllama-f16-8" "exllama-bf16-4" "exllama-bf16-8";
    "marlin" &["marlin_256x8", "marlin_256x16", "marlin_256x32", "marlin_128x64", "marlin_256x64", "arrange"] =>
        "marlin-f16-4-g64-sym" "marlin-f16-4-g64-asym" "marlin-f16-4-g32-sym" "marlin-f16-4-g32-asym"
        "marlin-f16-8-g64-sym" "marlin-f16-8-g64-asym" "marlin-f16-8-g32-sym" "marlin-f16-8-g32-asym"
        "marlin-bf16-4-g64-sym" "marlin-bf16-4-g64-asym" "marlin-bf16-4-g32-sym" "marlin-bf16-4-g32-asym"
        "marlin-bf16-8-g64-sym" "marlin-bf16-8-g64-asym" "marlin-bf16-8-g32-sym" "marlin-bf16-8-g32-asym";
    "ops-sm80" OPS => "ops-f16-sm80" "ops-bf16-sm80";
    "ops-sm90" OPS => "ops-f16-sm90" "ops-bf16-sm90";
    "attention-sm80" ATTENTION =>
        "attention-f16-32-sm80" "attention-f16-64-sm80" "attention-f16-96-sm80" "attention-f16-128-sm80"
        "attention-bf16-32-sm80" "attention-bf16-64-sm80" "attention-bf16-96-sm80" "attention-bf16-128-sm80";
    "attention-sm80" &["attention_prefill"] => "attention-f16-256-sm80" "attention-bf16-256-sm80";
    "attention-sm90" ATTENTION =>
        "attention-f16-32-sm90" "attention-f16-64-sm90" "attention-f16-96-sm90" "attention-f16-128-sm90"
        "attention-bf16-32-sm90" "attention-bf16-64-sm90" "attention-bf16-96-sm90" "attention-bf16-128-sm90";
    "attention-sm90" &["attention_prefill"] => "attention-f16-256-sm90" "attention-bf16-256-sm90";
    "attention8" &["attention_prefill", "append_bytes"] =>
        "attention8-f16-32" "attention8-f16-64" "attention8-f16-96" "attention8-f16-128" "attention8-f16-256"
        "attention8-bf16-32" "attention8-bf16-64" "attention8-bf16-96" "attention8-bf16-128" "attention8-bf16-256";
    "decode8-sm90" DECODE8 =>
        "decode8-f16-32-sm90" "decode8-f16-64-sm90" "decode8-f16-96-sm90" "decode8-f16-128-sm90"
        "decode8-bf16-32-sm90" "decode8-bf16-64-sm90" "decode8-bf16-96-sm90" "decode8-bf16-128-sm90";
}

/// How a kernel begins.
const KERNEL: &str = "\n.visible .entry ";

/// Of an image's PTX, what kernel `entry` needs, with a NUL at the end.
pub(super) fn only(ptx: &str, entry: &str) -> Option<Vec<u8>> {
    let mut parts = ptx.split(KERNEL);
    let declarations = parts.next()?;
    let kernel = parts.find(|kernel| kernel.strip_prefix(entry).is_some_and(|rest| rest.starts_with('(')))?;
    Some([declarations, KERNEL, kernel, "\0"].concat().into_bytes())
}

/// The image of that name.
pub(super) fn find(name: &str) -> Option<&'static Image> {
    IMAGES.iter().find(|image| image.name == name)
}

/// The version of a kernel whose images are these families: the beginnings of the archives' hashes.
pub(super) fn version(families: &[&str]) -> Option<String> {
    let hashes = families.iter().map(|&family| {
        let image = IMAGES.iter().find(|image| image.family == family)?;
        let line = image.manifest.lines().find(|line| line.ends_with(".lzma"))?;
        line.get(..12)
    });
    Some(hashes.collect::<Option<Vec<_>>>()?.join("-"))
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        fs,
        path::{Path, PathBuf},
    };

    use sha2::{Digest, Sha256};

    use super::*;

    fn cuda() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda")
    }

    fn collect_includes(file: &str, files: &mut BTreeSet<String>) {
        if files.insert(file.to_owned()) {
            for line in fs::read_to_string(cuda().join(file)).unwrap().lines() {
                if let Some(rest) = line.strip_prefix("#include \"") {
                    collect_includes(rest.trim_end_matches('"'), files);
                }
            }
        }
    }

    #[test]
    fn images_are_made_from_these_sources() {
        let families: BTreeSet<_> = IMAGES.iter().map(|image| image.family).collect();
        let mut compiled = BTreeSet::new();
        for family in families {
            let manifest = fs::read_to_string(cuda().join("ptx").join(family).join("manifest.txt")).unwrap();
            let (mut listed, mut needed) = (BTreeSet::new(), BTreeSet::new());
            for line in manifest.lines().filter(|line| !line.starts_with('#')) {
                let (hash, file) = line.split_once("  ").unwrap();
                let got: String = Sha256::digest(fs::read(cuda().join(file)).unwrap())
                    .iter()
                    .map(|b| format!("{b:02x}"))
                    .collect();
                assert_eq!(got, hash, "{file} has changed: run the generator, see cuda/README.md");
                listed.insert(file.to_owned());
                if file.ends_with(".cu") {
                    collect_includes(file, &mut needed);
                    compiled.insert(file.to_owned());
                }
            }
            needed.insert(format!("ptx/{family}/images.lzma"));
            assert_eq!(listed, needed, "{family}");
        }
        let sources =
            fs::read_dir(cuda()).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
        let sources: BTreeSet<_> = sources.filter(|name| name.ends_with(".cu")).collect();
        assert_eq!(compiled, sources);
    }

    #[test]
    fn versions_are_of_the_archives() {
        let hash = Sha256::digest(find("plain-f16-2").unwrap().archive);
        let begin: String = hash.iter().take(6).map(|b| format!("{b:02x}")).collect();
        assert_eq!(version(&["plain"]).unwrap(), begin);
        assert_eq!(version(&["plain", "plain"]).unwrap(), format!("{begin}-{begin}"));
        assert_eq!(version(&["plain", "no such family"]), None);
    }

    #[test]
    fn a_kernel_stands_by_itself() {
        for image in IMAGES {
            let ptx = image.ptx().unwrap();
            let declared = ptx.split(KERNEL).next().unwrap().len();
            for entry in image.entries {
                let kernel = String::from_utf8(only(&ptx, entry).unwrap()).unwrap();
                let body = kernel[declared..].trim_end_matches(['\0', '\n']);
                // It ends where its first brace is closed, and declares nothing for others.
                let depths = body.char_indices().scan(0i32, |depth, (at, c)| {
                    *depth += i32::from(c == '{') - i32::from(c == '}');
                    Some((at, c, *depth))
                });
                let (end, _, _) = depths.into_iter().find(|&(_, c, depth)| c == '}' && depth == 0).unwrap();
                assert_eq!(end + 1, body.len(), "{}: {entry}", image.name);
            }
            assert_eq!(only(&ptx, "no such kernel"), None);
        }
    }

    #[test]
    fn images_have_their_entry_points_and_are_small() {
        for image in IMAGES {
            let ptx = image.ptx().unwrap();
            for entry in image.entries {
                assert!(ptx.contains(&format!(".entry {entry}(")), "{}: no {entry}", image.name);
            }
            assert_eq!(ptx.matches(".entry ").count(), image.entries.len(), "{}", image.name);
            assert!(ptx.contains(".version 8.0"), "{}", image.name);
        }
        let families: BTreeMap<_, _> =
            IMAGES.iter().map(|image| (image.family, image.archive.len())).collect();
        assert!(families.values().sum::<usize>() < 2 << 20, "{families:?}");
    }
}
