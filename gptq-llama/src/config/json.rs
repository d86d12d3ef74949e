//! Typed access to a JSON object, with errors that name the key.

use serde_json::{Map, Value};

use super::ConfigError;

/// An object and where it stands in the file.
pub(super) struct Object<'a> {
    map: std::borrow::Cow<'a, Map<String, Value>>,
    prefix: String,
}

impl Object<'static> {
    pub(super) fn parse(text: &str) -> Result<Self, ConfigError> {
        let json = |reason: String| ConfigError::Json { reason };
        match serde_json::from_str(text).map_err(|error| json(error.to_string()))? {
            Value::Object(map) => Ok(Self { map: std::borrow::Cow::Owned(map), prefix: String::new() }),
            other => Err(json(format!("found {}", kind(&other)))),
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

impl Object<'_> {
    /// The value, unless it is missing or null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing { key: format!("{}{key}", self.prefix) }
    }

    pub(super) fn value(&self, key: &str, expected: &str) -> ConfigError {
        let value = self.map.get(key).map_or_else(|| "missing".to_owned(), Value::to_string);
        ConfigError::Value { key: format!("{}{key}", self.prefix), value, expected: expected.to_owned() }
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Object<'_>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Object {
                map: std::borrow::Cow::Borrowed(map),
                prefix: format!("{}{key}.", self.prefix),
            })),
            Some(_) => Err(self.value(key, "must be an object")),
        }
    }

    pub(super) fn string(&self, key: &str) -> Result<Option<&str>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.value(key, "must be a string")),
        }
    }

    pub(super) fn strings(&self, key: &str) -> Result<Option<Vec<&str>>, ConfigError> {
        let strings = match self.get(key) {
            None => return Ok(None),
            Some(Value::Array(list)) => list.iter().map(Value::as_str).collect::<Option<Vec<_>>>(),
            Some(_) => None,
        };
        strings.map(Some).ok_or_else(|| self.value(key, "must be a list of strings"))
    }

    pub(super) fn bool_or(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(_) => Err(self.value(key, "must be true or false")),
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() => Ok(Some(number)),
                _ => Err(self.value(key, "must be a number")),
            },
        }
    }

    pub(super) fn number_or(&self, key: &str, default: f64) -> Result<f64, ConfigError> {
        Ok(self.number(key)?.unwrap_or(default))
    }

    /// A number of things: below 2^32, so that the product of two fits 64 bits.
    fn count(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64().map(u32::try_from) {
                Some(Ok(number)) => Ok(Some(number as usize)),
                _ => Err(self.value(key, "must be a whole number below 2^32")),
            },
        }
    }

    pub(super) fn count_or(&self, key: &str, default: usize) -> Result<usize, ConfigError> {
        Ok(self.count(key)?.unwrap_or(default))
    }

    pub(super) fn optional_positive(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        match self.count(key)? {
            Some(0) => Err(self.value(key, "must be positive")),
            other => Ok(other),
        }
    }

    pub(super) fn positive(&self, key: &str) -> Result<usize, ConfigError> {
        self.optional_positive(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn positive_or(&self, key: &str, default: usize) -> Result<usize, ConfigError> {
        Ok(self.optional_positive(key)?.unwrap_or(default))
    }

    /// One token id or a list of them.
    pub(super) fn tokens(&self, key: &str) -> Result<Vec<u32>, ConfigError> {
        let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.get(key) {
            None => Some(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(one).collect(),
            Some(value) => one(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.value(key, "must be a token id or a list of them"))
    }
}
