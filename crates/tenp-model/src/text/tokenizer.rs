//! The checkpoint's own tokenizer, with its rules for the first token and for chats.

use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, context};
use serde_json::Value;
use tenp_checkpoint::Checkpoint;

use crate::ModelError;

/// A checkpoint's tokenizer.
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    bos_text: String,
    eos_text: String,
    chat_template: Option<String>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a checkpoint's folder.
    ///
    /// # Errors
    /// Missing or unreadable files.
    pub fn open(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let dir = checkpoint.dir();
        let path = dir.join("tokenizer.json");
        let fail = |path: &Path, why: String| ModelError::Tokenizer {
            path: path.to_owned(),
            why,
        };
        if !path.exists() {
            let why = "there is no such file; copy the base model's tokenizer.json here, or pass token ids \
                       (.safetensors with input_ids)";
            return Err(fail(&path, why.to_owned()));
        }
        let inner = tokenizers::Tokenizer::from_file(&path).map_err(|e| {
            fail(
                &path,
                format!("{e}; copy the file from the base model again"),
            )
        })?;
        let config_path = dir.join("tokenizer_config.json");
        let config: Value = match std::fs::read(&config_path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|e| fail(&config_path, e.to_string()))?
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Value::Null,
            Err(source) => {
                return Err(ModelError::Io {
                    path: config_path,
                    source,
                });
            }
        };
        // A special token is a string or an object with `content`.
        let token_text = |name: &str| {
            let value = &config[name];
            value
                .as_str()
                .or_else(|| value["content"].as_str())
                .unwrap_or_default()
                .to_owned()
        };
        let (bos_text, eos_text) = (token_text("bos_token"), token_text("eos_token"));
        let chat_template = match std::fs::read_to_string(dir.join("chat_template.jinja")) {
            Ok(text) => Some(text),
            Err(_) => chat_template(&config["chat_template"]),
        };
        let mut tokenizer = Self {
            path,
            inner,
            bos: None,
            bos_text,
            eos_text,
            chat_template,
        };
        let added = tokenizer.added_by_post_processor()?;
        let named = tokenizer
            .inner
            .token_to_id(&tokenizer.bos_text)
            .or(checkpoint.config().bos_token_id);
        tokenizer.bos = match config["add_bos_token"].as_bool() {
            Some(true) => added.or(named),
            _ => added,
        };
        Ok(tokenizer)
    }

    /// The token that the post-processor puts before every text, if it does.
    fn added_by_post_processor(&self) -> Result<Option<u32>, ModelError> {
        let (plain, special) = (self.encode("a", false)?, self.encode("a", true)?);
        let added = special.len() > plain.len() && special[1..].starts_with(&plain);
        Ok(if added {
            special.first().copied()
        } else {
            None
        })
    }

    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, ModelError> {
        let encoding =
            self.inner
                .encode_fast(text, special)
                .map_err(|e| ModelError::Tokenizer {
                    path: self.path.clone(),
                    why: e.to_string(),
                })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of a text as it stands, without any token added.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        self.encode(text, false)
    }

    /// Ids of a text that begins a sequence: the beginning-of-sequence token once, where the tokenizer wants one.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn sequence(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let mut ids: Vec<u32> = self.bos.into_iter().collect();
        ids.extend(self.encode(text, false)?);
        Ok(ids)
    }

    /// Text of ids; special tokens are left out.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn text(&self, ids: &[u32]) -> Result<String, ModelError> {
        self.inner
            .decode(ids, true)
            .map_err(|e| ModelError::Tokenizer {
                path: self.path.clone(),
                why: e.to_string(),
            })
    }

    /// Ids of a chat, laid out by the tokenizer's chat template (which brings its own special tokens); `answer_next` ends
    /// it where the assistant's next answer begins.
    ///
    /// # Errors
    /// There is no template, or it refuses these messages.
    pub fn chat(&self, messages: &Value, answer_next: bool) -> Result<Vec<u32>, ModelError> {
        let fail = |why: String| ModelError::Tokenizer {
            path: self.path.clone(),
            why,
        };
        let template = self.chat_template.as_deref().ok_or_else(|| {
            fail("there is no chat template (tokenizer_config.json or chat_template.jinja); use `prompt` and `answer`, or `text`".into())
        })?;
        let mut environment = Environment::new();
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|e| fail(e.to_string()))?);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        let text = environment
            .render_str(
                template,
                context! {
                    messages => minijinja::Value::from(minijinja::value::Serde(messages)),
                    bos_token => &self.bos_text,
                    eos_token => &self.eos_text,
                    add_generation_prompt => answer_next,
                },
            )
            .map_err(|e| fail(format!("chat template: {e:#}")))?;
        self.encode(&text, false)
    }
}

/// A template is a string, or a list of named ones of which `default` is meant.
fn chat_template(value: &Value) -> Option<String> {
    if let Some(text) = value.as_str() {
        return Some(text.to_owned());
    }
    let named = value.as_array()?;
    let default = named.iter().find(|t| t["name"] == "default")?;
    default["template"].as_str().map(str::to_owned)
}
