//! Token rows from files: `.jsonl` with a key `text`, `.txt`, or `.safetensors` with token ids.

use std::{fs, path::Path};

use gptq_format::{Dtype, Tensor, TensorFile};
use gptq_llama::{LlamaConfig, TokenRows};

use crate::{failure::Failure, text::TextCodec};

/// Tokens of a row of text, unless asked for otherwise, at most.
const TEXT_ROW: usize = 2048;

/// Where rows come from and how they are cut.
#[derive(Clone, Copy, Debug)]
pub struct RowSource<'a> {
    /// The file.
    pub file: &'a Path,
    /// Name of the tensor of token ids, if the file is `.safetensors`.
    pub key: &'a str,
    /// Folder of the model, whose tokeniser is used for texts.
    pub model: &'a Path,
    /// Rows to use, all if `None`.
    pub rows: Option<usize>,
    /// Tokens a row. Token ids are taken as they stand if `None`; texts then make rows of the model's context, at most
    /// 2048.
    pub seq_len: Option<usize>,
    /// Drop texts of at most [`TokenRows::SHORT`] tokens, as calibration does.
    pub drop_short: bool,
}

impl RowSource<'_> {
    /// Reads the rows. The rules are those of [`TokenRows`].
    pub fn read(&self, config: &LlamaConfig) -> Result<TokenRows, Failure> {
        let name = self.file.display();
        let extension = self.file.extension().and_then(|extension| extension.to_str()).unwrap_or("");
        let text_len = self.seq_len.unwrap_or(config.max_positions.min(TEXT_ROW));
        let rows = match extension {
            "safetensors" => {
                let rows = self.read_ids()?;
                match self.seq_len {
                    Some(len) => rows.truncate(len)?,
                    None => rows,
                }
            }
            "jsonl" => {
                let codec = TextCodec::open(self.model)?;
                let texts = texts(&read_text(self.file)?).map_err(|error| format!("{name}: {error}"))?;
                let ids: Result<Vec<_>, _> = texts.iter().map(|text| codec.encode(text)).collect();
                TokenRows::new(ids?).map_err(|error| format!("{name}: {error}"))?.truncate(text_len)?
            }
            "txt" | "raw" => {
                let ids = TextCodec::open(self.model)?.encode(&read_text(self.file)?)?;
                TokenRows::windows(&ids, text_len).map_err(|error| format!("{name}: {error}"))?
            }
            _ => return Err(format!("{name}: must end in .jsonl, .txt or .safetensors").into()),
        };
        let rows = if self.drop_short && extension == "jsonl" { rows.drop_short()? } else { rows };
        let rows = match self.rows {
            Some(count) => rows.take(count)?,
            None => rows,
        };
        rows.check_vocabulary(config.vocab_size).map_err(|error| format!("{name}: {error}"))?;
        Ok(rows)
    }

    fn read_ids(&self) -> Result<TokenRows, Failure> {
        let file = TensorFile::open(self.file)?;
        let tensor = file.get(self.key).ok_or_else(|| {
            let names: Vec<&str> = file.tensors().map(|tensor| tensor.name()).collect();
            format!("{}: no tensor {:?}, there are {names:?}", self.file.display(), self.key)
        })?;
        token_rows(&tensor)
    }
}

/// Rows of a tensor of token ids, `(n)` or `(rows, n)`, int32 or int64.
pub fn token_rows(tensor: &Tensor<'_>) -> Result<TokenRows, Failure> {
    let name = tensor.name();
    let ids: Vec<i64> = match tensor.dtype() {
        Dtype::I64 => tensor.i64s()?.to_vec(),
        Dtype::I32 | Dtype::U32 => {
            let bytes = tensor.bytes().chunks_exact(4);
            bytes.map(|b| i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
        }
        other => return Err(format!("{name}: token ids must be int32 or int64, not {other:?}").into()),
    };
    let len = match tensor.shape() {
        [len] | [_, len] => *len,
        shape => return Err(format!("{name}: shape {shape:?} is not (n) or (rows, n)").into()),
    };
    let tokens: Result<Vec<u32>, _> = ids.iter().map(|&id| u32::try_from(id)).collect();
    let tokens = tokens.map_err(|_| format!("{name}: holds a negative or too large id"))?;
    Ok(TokenRows::new(tokens.chunks(len.max(1)).map(<[u32]>::to_vec).collect())?)
}

fn read_text(file: &Path) -> Result<String, Failure> {
    fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()).into())
}

/// The key `text` of each line.
fn texts(lines: &str) -> Result<Vec<String>, Failure> {
    let mut texts = Vec::new();
    for (number, line) in (1..).zip(lines.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let json: serde_json::Value =
            serde_json::from_str(line).map_err(|error| format!("line {number}: {error}"))?;
        let text = json.get("text").and_then(|text| text.as_str());
        texts.push(text.ok_or_else(|| format!("line {number}: no key \"text\" with a string"))?.to_owned());
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_json() {
        assert_eq!(texts("{\"text\": \"a\"}\n\n{\"text\": \"b\", \"id\": 1}\n").unwrap(), ["a", "b"]);
        assert_eq!(texts("{}").unwrap_err().to_string(), "line 1: no key \"text\" with a string");
        assert!(texts("{\"text\": \"a\"}\nx").unwrap_err().to_string().starts_with("line 2: "));
    }

    fn tiny(file: &str, key: &'static str, seq_len: Option<usize>) -> Result<TokenRows, Failure> {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tiny-books");
        let config = LlamaConfig::read(&model)?;
        RowSource { file: &model.join(file), key, model: &model, rows: Some(5), seq_len, drop_short: true }
            .read(&config)
    }

    #[test]
    fn ids_are_taken_as_they_stand() {
        let rows = tiny("ids.safetensors", "calibration", None).unwrap();
        assert_eq!((rows.rows().len(), rows.longest(), rows.rows()[0][0]), (5, 512, 0));
        assert_eq!(tiny("ids.safetensors", "calibration", Some(9)).unwrap().longest(), 9);
        let error = tiny("ids.safetensors", "nothing", None).unwrap_err().to_string();
        assert!(
            error.ends_with("no tensor \"nothing\", there are [\"calibration\", \"evaluation\"]"),
            "{error}"
        );
    }

    #[test]
    fn texts_begin_with_the_first_token_and_fit_the_context() {
        let rows = tiny("calibration.jsonl", "", None).unwrap();
        assert!(rows.rows().iter().all(|row| row[0] == 0 && row.len() <= 512));
        let error = tiny("config.json", "", None).unwrap_err().to_string();
        assert!(error.ends_with("must end in .jsonl, .txt or .safetensors"), "{error}");
    }
}
