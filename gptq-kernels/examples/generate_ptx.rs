//! Compiles the CUDA sources in `cuda/` to the PTX images in `cuda/ptx/` and writes their manifests. `cuda/README.md` says
//! how to run it.

use std::{collections::BTreeSet, env, error::Error, fs, io::Write, path::Path};

use cudarc::nvrtc::{self, CompileOptions};
use lzma_rust2::{LzmaOptions, LzmaWriter};
use sha2::{Digest, Sha256};

#[path = "../src/cuda/registers.rs"]
mod registers;

/// Images of one source. They have a folder and a manifest of their own.
struct Family {
    /// Name of the folder.
    name: &'static str,
    source: &'static str,
    arch: &'static str,
    /// Name and macros of every image.
    images: Vec<(String, Vec<String>)>,
}

/// What `attention.cu` is compiled to: for keys and values in bytes or in halves, and which kernels.
fn attention_macros(bytes: bool, prefill: bool, decode: bool) -> [String; 4] {
    let class = if bytes { "BytePages" } else { "HalfPages" };
    let flag = |name: &str, value: bool| format!("-DIMAGE_{name}={}", u32::from(value));
    [format!("-DIMAGE_PAGES={class}"), flag("BYTES", bytes), flag("PREFILL", prefill), flag("DECODE", decode)]
}

const HALVES: [(&str, &str); 2] = [("f16", "Fp16"), ("bf16", "Bf16")];

fn families() -> Vec<Family> {
    let mut plain = Vec::new();
    let (mut gemv, mut gemv_block) = (Vec::new(), Vec::new());
    let mut wgmma = Vec::new();
    let (mut dense, mut dense90) = (Vec::new(), Vec::new());
    let (mut marlin, mut exllama) = (Vec::new(), Vec::new());
    for (half, class) in HALVES {
        let half_macro = format!("-DIMAGE_HALF={class}");
        for bits in [2, 3, 4, 8] {
            plain.push((
                format!("plain-{half}-{bits}"),
                vec![half_macro.clone(), format!("-DIMAGE_BITS={bits}")],
            ));
        }
        for (weight, class, bits) in [("f16", "Fp16", "u16"), ("bf16", "Bf16", "u16"), ("f32", "Fp32", "u32")]
        {
            let weight_macros = [format!("-DIMAGE_WEIGHT={class}"), format!("-DIMAGE_WEIGHT_BITS={bits}")];
            let macros: Vec<_> = [half_macro.clone()].into_iter().chain(weight_macros).collect();
            if half == weight {
                dense90.push((format!("dense90-{half}"), macros.clone()));
            }
            dense.push((format!("dense-{half}-{weight}"), macros));
        }
        for bits in [4, 8] {
            let bits_macro = format!("-DIMAGE_BITS={bits}");
            exllama.push((format!("exllama-{half}-{bits}"), vec![half_macro.clone(), bits_macro]));
            for (group, short) in [("g64", false), ("g32", true)] {
                for (zero, asym) in [("sym", false), ("asym", true)] {
                    let bits_macro = format!("-DIMAGE_BITS={bits}");
                    let kinds = [format!("-DIMAGE_SHORT={short}"), format!("-DIMAGE_ASYM={asym}")];
                    let macros = [half_macro.clone(), bits_macro].into_iter().chain(kinds);
                    marlin.push((format!("marlin-{half}-{bits}-{group}-{zero}"), macros.collect()));
                }
            }
        }
        for group in [128, 64, 32] {
            for (zero, asym) in [("sym", false), ("asym", true)] {
                let groups = format!("-DIMAGE_GROUPS={}", 128 / group);
                let macros = vec![half_macro.clone(), groups, format!("-DIMAGE_ASYM={asym}")];
                for (family, by_block) in [(&mut gemv, 0), (&mut gemv_block, 1)] {
                    let name = if by_block == 0 { "gemv" } else { "gemv-block" };
                    let mut macros = macros.clone();
                    macros.push(format!("-DIMAGE_BY_BLOCK={by_block}"));
                    family.push((format!("{name}-{half}-g{group}-{zero}"), macros));
                }
                wgmma.push((format!("wgmma-{half}-g{group}-{zero}"), macros));
            }
        }
    }
    // What does not decode is the same for all GPUs: it lasts so long that its start does not matter.
    // Older GPUs decode with it, too.
    let (mut attention8, mut decode8) = (Vec::new(), Vec::new());
    let mut decoder = |sm: &'static str| {
        let (mut ops, mut attention) = (Vec::new(), Vec::new());
        for (half, class) in HALVES {
            let macros =
                vec![format!("-DIMAGE_HALF={class}"), format!("-DIMAGE_SM90={}", u32::from(sm == "sm90"))];
            ops.push((format!("ops-{half}-{sm}"), macros.clone()));
            for dim in [32, 64, 96, 128, 256] {
                let mut macros = macros.clone();
                macros.push(format!("-DIMAGE_DIM={dim}"));
                let with = |bytes, prefill, decode| {
                    macros.iter().cloned().chain(attention_macros(bytes, prefill, decode)).collect()
                };
                attention.push((format!("attention-{half}-{dim}-{sm}"), with(false, true, true)));
                if dim <= 128 && sm == "sm90" {
                    decode8.push((format!("decode8-{half}-{dim}-{sm}"), with(true, false, true)));
                }
                if sm == "sm80" {
                    attention8.push((format!("attention8-{half}-{dim}"), with(true, true, false)));
                }
            }
        }
        (ops, attention)
    };
    let ((ops_80, attention_80), (ops_90, attention_90)) = (decoder("sm80"), decoder("sm90"));
    vec![
        Family { name: "ops-sm80", source: "ops.cu", arch: "compute_80", images: ops_80 },
        Family { name: "ops-sm90", source: "ops.cu", arch: "compute_90", images: ops_90 },
        Family { name: "attention-sm80", source: "attention.cu", arch: "compute_80", images: attention_80 },
        Family { name: "attention-sm90", source: "attention.cu", arch: "compute_90", images: attention_90 },
        Family { name: "attention8", source: "attention.cu", arch: "compute_80", images: attention8 },
        Family { name: "decode8-sm90", source: "attention.cu", arch: "compute_90", images: decode8 },
        Family { name: "plain", source: "plain.cu", arch: "compute_80", images: plain },
        Family { name: "dense", source: "dense.cu", arch: "compute_80", images: dense },
        Family { name: "dense90", source: "dense.cu", arch: "compute_90", images: dense90 },
        Family {
            name: "quantize",
            source: "quantize.cu",
            arch: "compute_80",
            images: vec![("quantize".into(), Vec::new())],
        },
        Family {
            name: "single",
            source: "single.cu",
            arch: "compute_80",
            images: vec![("single".into(), Vec::new())],
        },
        Family { name: "gemv", source: "gemv_sm90.cu", arch: "compute_90", images: gemv },
        Family { name: "gemv-block", source: "gemv_sm90.cu", arch: "compute_90", images: gemv_block },
        Family { name: "exllama", source: "exllama.cu", arch: "compute_80", images: exllama },
        Family { name: "marlin", source: "marlin.cu", arch: "compute_80", images: marlin },
        Family { name: "wgmma", source: "wgmma_sm90.cu", arch: "compute_90a", images: wgmma },
    ]
}

/// PTX without comments and indentation, which are half of it.
fn strip(ptx: &str) -> String {
    let lines = ptx.lines().map(|line| line.split("//").next().unwrap_or_default().trim());
    lines.filter(|line| !line.is_empty()).flat_map(|line| [line, "\n"]).collect()
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Adds `file` and all that it includes to `files`.
fn collect_includes(cuda: &Path, file: &str, files: &mut BTreeSet<String>) -> Result<(), Box<dyn Error>> {
    if files.insert(file.to_owned()) {
        for line in fs::read_to_string(cuda.join(file))?.lines() {
            if let Some(rest) = line.strip_prefix("#include \"") {
                collect_includes(cuda, rest.trim_end_matches('"'), files)?;
            }
        }
    }
    Ok(())
}

/// The archive of `images`, names and PTX.
fn pack(images: &[(String, String)], relative: bool) -> Result<Vec<u8>, Box<dyn Error>> {
    // Text has no positions modulo four, and long repeats are what there is to find: 4 % less than the preset.
    let preset = LzmaOptions::with_preset(9);
    let options = LzmaOptions { dict_size: 8 << 20, pb: 0, nice_len: 273, depth_limit: 1000, ..preset };
    let mut archive = LzmaWriter::new_use_header(Vec::new(), &options, None)?;
    for (name, ptx) in images {
        if !relative {
            write!(archive, "{name} {}\n{ptx}", ptx.len())?;
            continue;
        }
        let text = registers::relative(ptx).ok_or_else(|| format!("{name}: registers beyond 32 bits"))?;
        if registers::absolute(&text).as_ref() != Some(ptx) {
            let message = "PTX has something else than registers behind a per cent sign";
            return Err(format!("{name}: {message}").into());
        }
        write!(archive, "{name} {} relative\n{text}", text.len())?;
    }
    Ok(archive.finish()?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let cuda = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both pointers are to live integers.
    unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor).result()? };
    if (major, minor) != (12, 0) {
        return Err(
            format!("NVRTC is {major}.{minor}, but images must be made by 12.0, see cuda/README.md").into()
        );
    }
    let wanted: Vec<String> = env::args().skip(1).collect();
    for family in families() {
        if !wanted.is_empty() && !wanted.iter().any(|name| name == family.name) {
            continue;
        }
        let folder = cuda.join("ptx").join(family.name);
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
        let mut manifest =
            String::from("# SHA-256 of the sources, and of the images that were made from them\n");
        let mut sources = BTreeSet::new();
        collect_includes(&cuda, family.source, &mut sources)?;
        for name in sources {
            manifest += &format!("{}  {name}\n", hash(&fs::read(cuda.join(&name))?));
        }
        let mut images = Vec::new();
        for (name, mut macros) in family.images {
            let arch = format!("--gpu-architecture={}", family.arch);
            macros.extend(["--std=c++17".into(), "-default-device".into(), arch]);
            let options = CompileOptions {
                include_paths: vec![cuda.to_string_lossy().into_owned()],
                options: macros,
                ..CompileOptions::default()
            };
            let ptx = nvrtc::compile_ptx_with_opts(fs::read_to_string(cuda.join(family.source))?, options)
                .map_err(|error| format!("{name}: {error:#?}"))?;
            images.push((name, strip(&ptx.to_src())));
        }
        // Which is smaller depends on how alike the images of a family are.
        let (absolute, relative) = (pack(&images, false)?, pack(&images, true)?);
        let packed = if relative.len() < absolute.len() { relative } else { absolute };
        let file = format!("ptx/{}/images.lzma", family.name);
        fs::write(cuda.join(&file), &packed)?;
        manifest += &format!("{}  {file}\n", hash(&packed));
        fs::write(folder.join("manifest.txt"), manifest)?;
    }
    Ok(())
}
