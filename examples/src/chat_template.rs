//! The chat templates of Llama 2 and Llama 3, found by what stands in `tokenizer_config.json`.
//!
//! A template is a program in Jinja. Two families are recognised by their marks and written here by hand; anything else is an
//! error, rather than a conversation in a form that the model does not know. What Llama 3.1 adds to the system message (dates,
//! tools) is not written.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// A family of templates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChatTemplate {
    /// `<s>[INST] <<SYS>>\nsystem\n<</SYS>>\n\nuser [/INST] reply</s>`
    Llama2,
    /// `<|start_header_id|>role<|end_header_id|>\n\ntext<|eot_id|>`
    Llama3,
}

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file cannot be read.
    #[error("{}: {reason}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system or the parser says.
        reason: String,
    },
    /// The model has none.
    #[error("{}: no chat_template here nor in chat_template.jinja: this is no model for conversations", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// It is of neither family.
    #[error("{}: a chat template of neither Llama 2 nor Llama 3, it begins with {beginning:?}", path.display())]
    Unknown {
        /// Where it is.
        path: PathBuf,
        /// The first characters.
        beginning: String,
    },
}

/// A template and the special tokens that it needs, of one model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatFormat {
    template: ChatTemplate,
    bos: String,
    eos: String,
}

impl ChatFormat {
    /// Reads `tokenizer_config.json`, and `chat_template.jinja` if the template lies there.
    pub fn read(dir: &Path) -> Result<Self, TemplateError> {
        let config_path = dir.join("tokenizer_config.json");
        let unreadable = |path: &Path, reason: String| TemplateError::Read { path: path.to_owned(), reason };
        let text = std::fs::read_to_string(&config_path)
            .map_err(|error| unreadable(&config_path, error.to_string()))?;
        let config: Value =
            serde_json::from_str(&text).map_err(|error| unreadable(&config_path, error.to_string()))?;
        let jinja = dir.join("chat_template.jinja");
        let (path, template) = match in_config(&config) {
            Some(template) => (config_path, template.to_owned()),
            None if jinja.is_file() => {
                let text = std::fs::read_to_string(&jinja);
                (jinja.clone(), text.map_err(|error| unreadable(&jinja, error.to_string()))?)
            }
            None => return Err(TemplateError::Missing { path: config_path }),
        };
        let Some(template) = ChatTemplate::recognise(&template) else {
            return Err(TemplateError::Unknown { path, beginning: template.chars().take(60).collect() });
        };
        let (bos, eos) = template.default_tokens();
        // A token is a string, or an object that says how it is matched.
        let token = |key: &str, default: &str| {
            let value = &config[key];
            value.as_str().or_else(|| value["content"].as_str()).unwrap_or(default).to_owned()
        };
        Ok(Self { template, bos: token("bos_token", bos), eos: token("eos_token", eos) })
    }

    /// The family.
    pub fn template(&self) -> ChatTemplate {
        self.template
    }

    /// Tokens that end a reply.
    pub fn ends(&self) -> Vec<&str> {
        match self.template {
            ChatTemplate::Llama2 => vec![&self.eos],
            ChatTemplate::Llama3 => vec!["<|eot_id|>", &self.eos],
        }
    }

    /// What the model reads before its first reply.
    pub fn first_turn(&self, system: Option<&str>, user: &str) -> String {
        let (bos, user) = (&self.bos, user.trim());
        match self.template {
            ChatTemplate::Llama2 => {
                let system = system.map_or_else(String::new, |text| format!("<<SYS>>\n{text}\n<</SYS>>\n\n"));
                format!("{bos}[INST] {system}{user} [/INST]")
            }
            ChatTemplate::Llama3 => {
                let system = system.map_or_else(String::new, |text| message("system", text));
                format!("{bos}{system}{}{}", message("user", user), header("assistant"))
            }
        }
    }

    /// What it reads between its last reply, which stands before this as the model wrote it, and the next one.
    pub fn next_turn(&self, user: &str) -> String {
        let user = user.trim();
        match self.template {
            ChatTemplate::Llama2 => format!("{}{}[INST] {user} [/INST]", self.eos, self.bos),
            ChatTemplate::Llama3 => format!("<|eot_id|>{}{}", message("user", user), header("assistant")),
        }
    }
}

impl ChatTemplate {
    fn recognise(template: &str) -> Option<Self> {
        let has = |marks: &[&str]| marks.iter().all(|mark| template.contains(mark));
        if has(&["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]) {
            Some(Self::Llama3)
        } else if has(&["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]) {
            Some(Self::Llama2)
        } else {
            None
        }
    }

    fn default_tokens(self) -> (&'static str, &'static str) {
        match self {
            Self::Llama2 => ("<s>", "</s>"),
            Self::Llama3 => ("<|begin_of_text|>", "<|eot_id|>"),
        }
    }
}

/// The template in the configuration: a string, or the one called `default` of several.
fn in_config(config: &Value) -> Option<&str> {
    let named = |list: &'_ Value| -> Option<usize> {
        list.as_array()?.iter().position(|entry| entry["name"] == "default")
    };
    let template = &config["chat_template"];
    match named(template) {
        Some(index) => template[index]["template"].as_str(),
        None => template.as_str(),
    }
}

fn header(role: &str) -> String {
    format!("<|start_header_id|>{role}<|end_header_id|>\n\n")
}

fn message(role: &str, text: &str) -> String {
    format!("{}{}<|eot_id|>", header(role), text.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA_2: &str = "{% for m in messages %}{{ bos_token + '[INST] ' + '<<SYS>>\\n' + '\\n<</SYS>>\\n\\n' + m + ' [/INST]' }}";
    const LLAMA_3: &str = "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + text | trim + '<|eot_id|>' }}";

    fn read(config: &Value, jinja: Option<&str>) -> Result<ChatFormat, TemplateError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        if let Some(text) = jinja {
            std::fs::write(dir.path().join("chat_template.jinja"), text).unwrap();
        }
        ChatFormat::read(dir.path())
    }

    #[test]
    fn llama_2() {
        let config =
            serde_json::json!({"chat_template": LLAMA_2, "bos_token": {"content": "<s>", "lstrip": false}});
        let format = read(&config, None).unwrap();
        assert_eq!(format.template(), ChatTemplate::Llama2);
        assert_eq!(
            format.first_turn(Some("Be brief."), " Hi "),
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"
        );
        assert_eq!(format.first_turn(None, "Hi"), "<s>[INST] Hi [/INST]");
        assert_eq!(format.next_turn("And?"), "</s><s>[INST] And? [/INST]");
        assert_eq!(format.ends(), ["</s>"]);
    }

    #[test]
    fn llama_3_by_name_and_in_a_file_of_its_own() {
        let list =
            serde_json::json!([{"name": "tool", "template": "x"}, {"name": "default", "template": LLAMA_3}]);
        let config = serde_json::json!({"chat_template": list, "eos_token": "<|end_of_text|>"});
        let format = read(&config, None).unwrap();
        assert_eq!(
            format,
            read(&serde_json::json!({"eos_token": "<|end_of_text|>"}), Some(LLAMA_3)).unwrap()
        );
        assert_eq!(
            format.first_turn(Some("Be brief."), "Hi"),
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>\
             <|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        );
        assert_eq!(
            format.next_turn("And?"),
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n"
        );
        assert_eq!(format.ends(), ["<|eot_id|>", "<|end_of_text|>"]);
    }

    #[test]
    fn others_are_refused() {
        let config = |template: &str| serde_json::json!({ "chat_template": template });
        // Mistral's has no system marks; ChatML is another family.
        for other in ["{{ '[INST] ' + m + ' [/INST]' }}", "<|im_start|>user\n"] {
            assert!(matches!(read(&config(other), None), Err(TemplateError::Unknown { .. })), "{other}");
        }
        assert!(matches!(read(&serde_json::json!({}), None), Err(TemplateError::Missing { .. })));
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(ChatFormat::read(dir.path()), Err(TemplateError::Read { .. })));
        std::fs::write(dir.path().join("tokenizer_config.json"), "[").unwrap();
        assert!(matches!(ChatFormat::read(dir.path()), Err(TemplateError::Read { .. })));
    }
}
