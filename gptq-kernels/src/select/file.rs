use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

use gptq_format::Bits;

use super::{CostPoint, CostTable, cost::Kind};
use crate::{DenseType, KernelError};

/// The first line of a file. The version of the crate is part of it, because costs of other kernels are of no use.
const TITLE: &str = concat!("gptq-kernels ", env!("CARGO_PKG_VERSION"), " costs 2");

/// Tables that ship with the crate, made by `examples/measure_costs.rs`.
const SHIPPED: [&str; 1] = [include_str!("../../costs/nvidia-h200.txt")];

/// Why a file of costs cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CostError {
    /// It cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It was written by another version of this crate, or is no such file.
    #[error("{path}: begins with {found:?}, not with {TITLE:?}")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its first line.
        found: String,
    },
    /// It was measured on another model.
    #[error("{path}: was measured on {found:?}, this is {expected:?}")]
    Model {
        /// The file.
        path: PathBuf,
        /// The model in the file.
        found: String,
        /// The model asked for.
        expected: String,
    },
    /// A line is not what it should be.
    #[error("{path}, line {line}: {what}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1 on.
        line: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// Measuring failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl CostTable {
    /// The table that ships with this crate for machines of that model, if there is one.
    pub fn shipped(model: &str) -> Option<Self> {
        SHIPPED.iter().find_map(|text| Self::parse(text, Path::new("shipped"), model).ok())
    }

    /// Reads a file of costs of machines of that model.
    ///
    /// Errors: [`CostError`], [`CostError::Io`] too if there is no such file.
    pub fn load(path: &Path, model: &str) -> Result<Self, CostError> {
        let text =
            fs::read_to_string(path).map_err(|source| CostError::Io { path: path.to_owned(), source })?;
        Self::parse(&text, path, model)
    }

    /// Writes the table, in place of a file that may be there, by way of another that is renamed.
    pub fn save(&self, path: &Path) -> Result<(), CostError> {
        let mut part = path.as_os_str().to_owned();
        part.push(format!(".{}.part", std::process::id()));
        let part = PathBuf::from(part);
        let written = fs::write(&part, self.text()).and_then(|()| fs::rename(&part, path));
        written.map_err(|source| {
            // The rest of a failed write is of no use; that it cannot be removed either says nothing new.
            let _ = fs::remove_file(&part);
            CostError::Io { path: path.to_owned(), source }
        })
    }

    /// What [`save`](Self::save) writes.
    pub fn text(&self) -> String {
        let mut text = format!("{TITLE}\nmodel {}\n", self.model);
        for (kernel, version) in &self.versions {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "version {kernel} {version}");
        }
        text += "# kernel, weight, in_features, out_features, rows, microseconds\n";
        for point in &self.points {
            let CostPoint { kernel, in_features, out_features, weight, rows, microseconds } = point;
            let kind = Kind::of(*weight, *in_features);
            let _ = writeln!(text, "{kernel} {kind} {in_features} {out_features} {rows} {microseconds:.2}");
        }
        text
    }

    fn parse(text: &str, path: &Path, model: &str) -> Result<Self, CostError> {
        let path = path.to_owned();
        let mut lines = text.lines().enumerate();
        let found = lines.next().map_or("", |(_, line)| line);
        if found != TITLE {
            return Err(CostError::Version { path, found: found.chars().take(80).collect() });
        }
        let found = lines.next().and_then(|(_, line)| line.strip_prefix("model "));
        let Some(found) = found else {
            return Err(CostError::Syntax { path, line: 2, what: "no model" });
        };
        if found != model {
            let (found, expected) = (found.to_owned(), model.to_owned());
            return Err(CostError::Model { path, found, expected });
        }
        let mut table = Self::new(model);
        for (index, line) in lines.filter(|(_, line)| !line.starts_with('#')) {
            if let Some((kernel, version)) =
                line.strip_prefix("version ").and_then(|line| line.split_once(' '))
            {
                table.versions.insert(kernel.to_owned(), version.to_owned());
                continue;
            }
            let point = parse_point(line).map_err(|what| CostError::Syntax {
                path: path.clone(),
                line: index + 1,
                what,
            })?;
            table.insert(point);
        }
        Ok(table)
    }
}

fn parse_point(line: &str) -> Result<CostPoint, &'static str> {
    let fields: Vec<&str> = line.split(' ').collect();
    let [kernel, kind, in_features, out_features, rows, microseconds] = fields[..] else {
        return Err("not six fields");
    };
    let positive = |text: &str| text.parse().ok().filter(|&number: &usize| number > 0);
    let in_features = positive(in_features).ok_or("in_features is not a positive number")?;
    let out_features = positive(out_features).ok_or("out_features is not a positive number")?;
    let rows = positive(rows).ok_or("rows is not a positive number")?;
    let time = microseconds.parse().ok().filter(|&time: &f64| time.is_finite() && time > 0.0);
    Ok(CostPoint {
        kernel: kernel.to_owned(),
        in_features,
        out_features,
        weight: parse_kind(kind).ok_or("no such weight")?.format(in_features),
        rows,
        microseconds: time.ok_or("microseconds are not a positive number")?,
    })
}

fn parse_kind(text: &str) -> Option<Kind> {
    match text {
        "f32" => return Some(Kind::Dense(DenseType::F32)),
        "f16" => return Some(Kind::Dense(DenseType::F16)),
        "bf16" => return Some(Kind::Dense(DenseType::Bf16)),
        _ => {}
    }
    let mut parts = text.split('-');
    let bits: u32 = parts.next()?.parse().ok()?;
    let bits = Bits::ALL.into_iter().find(|known| known.get() == bits)?;
    let sym = match parts.next()? {
        "sym" => true,
        "asym" => false,
        _ => return None,
    };
    let group_size = match parts.next()? {
        "one" => None,
        size => Some(size.parse().ok()?),
    };
    let act_order = match parts.next() {
        Some("act") => true,
        Some(_) => return None,
        None => false,
    };
    parts.next().is_none().then_some(Kind::Gptq { bits, group_size, sym, act_order })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WeightFormat;

    fn table() -> CostTable {
        let mut table = CostTable::new("a machine");
        let mut state = 1u32;
        for bits in Bits::ALL {
            for (group_size, sym, act_order) in [(32, true, false), (256, false, true), (128, false, false)] {
                state = state.wrapping_mul(747_796_405).wrapping_add(1);
                table.insert(CostPoint {
                    kernel: format!("kernel-{}", state % 3),
                    in_features: 256,
                    out_features: 64,
                    weight: WeightFormat::Gptq { bits, group_size, sym, act_order },
                    rows: 1 + state as usize % 7,
                    microseconds: f64::from(state % 1000 + 1) / 4.0,
                });
            }
        }
        table.insert(CostPoint {
            kernel: "dense".to_owned(),
            in_features: 256,
            out_features: 64,
            weight: WeightFormat::Dense(DenseType::Bf16),
            rows: 1,
            microseconds: 2.5,
        });
        table.versions.insert("kernel-1".to_owned(), "0123456789ab-cdef".to_owned());
        table
    }

    fn parse(text: &str) -> Result<CostTable, CostError> {
        CostTable::parse(text, Path::new("costs"), "a machine")
    }

    #[test]
    fn a_saved_table_is_the_same() {
        let folder = std::env::temp_dir().join(format!("gptq-costs-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("costs");
        table().save(&path).unwrap();
        table().save(&path).unwrap();
        assert_eq!(CostTable::load(&path, "a machine").unwrap(), table());
        assert!(
            matches!(CostTable::load(&path, "another"), Err(CostError::Model { found, .. }) if found == "a machine")
        );
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_dir_all(&folder).unwrap();
        assert!(matches!(CostTable::load(&path, "a machine"), Err(CostError::Io { .. })));
        assert!(matches!(table().save(&path), Err(CostError::Io { .. })));
    }

    #[test]
    fn other_versions_and_broken_lines_are_named() {
        let text = table().text();
        assert!(matches!(parse(""), Err(CostError::Version { .. })));
        assert!(matches!(
            parse(&text.replacen("costs 2", "costs 1", 1)),
            Err(CostError::Version { found, .. }) if found.ends_with('1')
        ));
        assert!(matches!(parse(TITLE), Err(CostError::Syntax { line: 2, .. })));
        for line in [
            "kernel 4-sym-128 256 64 1",
            "kernel 4-sym-128 256 64 1 2.0 3.0",
            "kernel 9-sym-128 256 64 1 2.0",
            "kernel 4-sym-128-bct 256 64 1 2.0",
            "kernel 4-sym-128 0 64 1 2.0",
            "kernel 4-sym-128 256 64 1 NaN",
            "kernel 4-sym-128 256 64 1 -1",
            "",
        ] {
            let broken = format!("{text}{line}\n");
            let lines = broken.lines().count();
            assert!(
                matches!(parse(&broken), Err(CostError::Syntax { line, .. }) if line == lines),
                "{line:?}"
            );
        }
    }

    #[test]
    fn shipped_tables_can_be_read() {
        for text in SHIPPED {
            let model = text.lines().nth(1).and_then(|line| line.strip_prefix("model ")).unwrap();
            let table = CostTable::parse(text, Path::new("shipped"), model).unwrap();
            assert!(!table.points().is_empty());
            for kernel in table.versions.keys() {
                assert!(table.points().iter().any(|point| point.kernel == *kernel), "{kernel}");
            }
            assert_eq!(CostTable::shipped(model), Some(table));
        }
        assert_eq!(CostTable::shipped("a machine"), None);
    }
}
