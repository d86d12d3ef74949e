//! Compiles the CUDA sources in `cuda/` to the PTX images in `cuda/ptx/` and writes their manifest. `cuda/README.md` says
//! how to run it.

use std::{error::Error, fs, path::Path};

use cudarc::nvrtc::{self, CompileOptions};
use sha2::{Digest, Sha256};

/// Name, source, architecture and macros of every image.
fn images() -> Vec<(String, &'static str, &'static str, Vec<String>)> {
    let mut images = Vec::new();
    for (half, class) in [("f16", "Fp16"), ("bf16", "Bf16")] {
        let half_macro = format!("-DIMAGE_HALF={class}");
        for bits in [2, 3, 4, 8] {
            let macros = vec![half_macro.clone(), format!("-DIMAGE_BITS={bits}")];
            images.push((format!("plain-{half}-{bits}"), "plain.cu", "compute_80", macros));
        }
        for group in [128, 64, 32] {
            for (zero, asym) in [("sym", false), ("asym", true)] {
                let groups = format!("-DIMAGE_GROUPS={}", 128 / group);
                let macros = vec![half_macro.clone(), groups, format!("-DIMAGE_ASYM={asym}")];
                images.push((format!("gemv-{half}-g{group}-{zero}"), "gemv_sm90.cu", "compute_90", macros));
            }
        }
    }
    images
}

/// PTX without comments and indentation, which are half of it.
fn strip(ptx: &str) -> String {
    let lines = ptx.lines().map(|line| line.split("//").next().unwrap_or_default().trim());
    lines.filter(|line| !line.is_empty()).flat_map(|line| [line, "\n"]).collect()
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
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
    fs::create_dir_all(cuda.join("ptx"))?;
    let mut manifest = String::from("# SHA-256 of the sources, and of the images that were made from them\n");
    let mut sources: Vec<_> = fs::read_dir(&cuda)?.collect::<Result<Vec<_>, _>>()?;
    sources.sort_by_key(fs::DirEntry::file_name);
    for source in sources {
        let name = source.file_name().into_string().map_err(|_| "a source's name is not UTF-8")?;
        if name.ends_with(".cu") || name.ends_with(".cuh") {
            manifest += &format!("{}  {name}\n", hash(&fs::read(source.path())?));
        }
    }
    for (name, source, arch, mut macros) in images() {
        macros.extend(["--std=c++17".into(), "-default-device".into(), format!("--gpu-architecture={arch}")]);
        let options = CompileOptions {
            include_paths: vec![cuda.to_string_lossy().into_owned()],
            options: macros,
            ..CompileOptions::default()
        };
        let ptx = nvrtc::compile_ptx_with_opts(fs::read_to_string(cuda.join(source))?, options)
            .map_err(|error| format!("{name}: {error:#?}"))?;
        let ptx = strip(&ptx.to_src());
        fs::write(cuda.join(format!("ptx/{name}.ptx")), &ptx)?;
        manifest += &format!("{}  ptx/{name}.ptx\n", hash(ptx.as_bytes()));
    }
    fs::write(cuda.join("ptx/manifest.txt"), manifest)?;
    Ok(())
}
