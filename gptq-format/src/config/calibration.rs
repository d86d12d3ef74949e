//! Calibration data in a config. transformers stores the texts themselves under `dataset`: megabytes that would be published
//! with every copy of the weights, and that may be private.

use serde_json::{Map, Value};

/// Keys with one of these in their name are about the calibration data.
const MARKS: [&str; 5] = ["dataset", "calib", "texts", "prompts", "examples"];
/// A dataset's name is at most so long.
const MAX_NAME: usize = 64;

/// Removes calibration data, and returns the keys that held some, with the path to them. What is left of such a key is
/// numbers, switches and a dataset's name.
pub(super) fn strip(fields: &mut Map<String, Value>) -> Vec<String> {
    let mut removed = Vec::new();
    walk(fields, "", false, &mut removed);
    removed
}

fn walk(fields: &mut Map<String, Value>, path: &str, is_calibration: bool, removed: &mut Vec<String>) {
    fields.retain(|key, value| {
        let path = format!("{path}{key}");
        let lower = key.to_lowercase();
        let is_calibration = is_calibration || MARKS.iter().any(|mark| lower.contains(mark));
        match value {
            Value::Object(nested) => {
                walk(nested, &format!("{path}."), is_calibration, removed);
                true
            }
            Value::String(text) if is_calibration && !is_name(text) => {
                removed.push(path);
                false
            }
            Value::Array(values) if is_calibration && !values.iter().all(Value::is_number) => {
                removed.push(path);
                false
            }
            _ => true,
        }
    });
}

/// Whether this is one word, as `wikitext2` or `allenai/c4` are: no text says much in that.
fn is_name(text: &str) -> bool {
    text.len() <= MAX_NAME && text.chars().all(|c| c.is_ascii_alphanumeric() || "._/:-".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stripped(json: &str) -> (String, Vec<String>) {
        let mut fields: Map<String, Value> = serde_json::from_str(json).expect("an object");
        let removed = strip(&mut fields);
        (Value::Object(fields).to_string(), removed)
    }

    #[test]
    fn texts_go() {
        for (json, left, removed) in [
            (r#"{"bits":4,"dataset":["The letter said.","So."]}"#, r#"{"bits":4}"#, "dataset"),
            (r#"{"dataset":"The letter said.","x":1}"#, r#"{"x":1}"#, "dataset"),
            (r#"{"dataset":["one"]}"#, "{}", "dataset"),
            (
                r#"{"meta":{"calibration_texts":["a b"],"damp":1}}"#,
                r#"{"meta":{"damp":1}}"#,
                "meta.calibration_texts",
            ),
            (r#"{"Calib":{"n":128,"prompt":"a b"}}"#, r#"{"Calib":{"n":128}}"#, "Calib.prompt"),
            (r#"{"dataset":[{"text":"a b"}]}"#, "{}", "dataset"),
        ] {
            assert_eq!(stripped(json), (left.to_owned(), vec![removed.to_owned()]), "{json}");
        }
        let long = format!(r#"{{"dataset":"{}"}}"#, "x".repeat(65));
        assert_eq!(stripped(&long).0, "{}");
    }

    #[test]
    fn names_and_numbers_stay_and_so_does_everything_else() {
        let json = r#"{"dataset":"allenai/c4","calibration_samples":128,"dataset_seed":[1,2],"calib":null,"note":"two words","dynamic":{"-:a b":{}}}"#;
        assert_eq!(stripped(json), (json.to_owned(), vec![]));
    }
}
