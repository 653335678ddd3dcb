//! [`Secrets`]: redacts keys and URL queries in texts that may be shown.

use secrecy::{ExposeSecret, SecretString};

/// The values of keys and secret headers. `Debug` shows none of them.
#[derive(Debug, Default)]
pub(crate) struct Secrets(Vec<SecretString>);

/// The shortest value that is treated as a secret. Local servers accept any word as a key, and replacing a short word
/// would make messages unreadable.
const MIN_LENGTH: usize = 4;

impl Secrets {
    pub(crate) fn add(&mut self, secret: &str) {
        if secret.len() >= MIN_LENGTH {
            self.0.push(secret.into());
        }
    }

    /// Replaces every secret and removes the query of every URL, where some services expect a key.
    pub(crate) fn redact(&self, text: &str) -> String {
        let mut text = strip_queries(text);
        for secret in &self.0 {
            if text.contains(secret.expose_secret()) {
                text = text.replace(secret.expose_secret(), "[secret]");
            }
        }
        text
    }
}

fn strip_queries(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("://") {
        let (before, url) = rest.split_at(start);
        let end = url
            .find(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '<' | '>' | ')' | '`'))
            .unwrap_or(url.len());
        let (url, after) = url.split_at(end);
        out.push_str(before);
        out.push_str(url.split_once('?').map_or(url, |(address, _)| address));
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_and_queries_are_removed_and_the_rest_is_kept() {
        let mut secrets = Secrets::default();
        secrets.add("sk-secret");
        secrets.add("x");
        let cases = [
            (
                "bad key sk-secret, sk-secret!",
                "bad key [secret], [secret]!",
            ),
            ("see https://a.b/c?key=1 (x)", "see https://a.b/c (x)"),
            ("(http://a/?q) \"http://b?é\"", "(http://a/) \"http://b\""),
            ("what? no: nothing", "what? no: nothing"),
            ("", ""),
        ];
        for (text, expected) in cases {
            assert_eq!(secrets.redact(text), expected);
        }
        assert!(!format!("{secrets:?}").contains("sk-secret"));
    }
}
