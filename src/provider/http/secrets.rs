//! What must never be shown, and how a text is made fit to be shown.

use secrecy::{ExposeSecret, SecretString};

/// The values of keys and secret headers. Its `Debug` is secrecy's, which shows none.
#[derive(Debug, Default)]
pub(crate) struct Secrets(Vec<SecretString>);

/// A value shorter than this is no secret (local servers take any word), and
/// replacing it would make messages unreadable.
const SHORTEST: usize = 4;

impl Secrets {
    pub(crate) fn add(&mut self, secret: &str) {
        if secret.len() >= SHORTEST {
            self.0.push(secret.into());
        }
    }

    /// Takes out every secret, and the query of every URL: some put a key there.
    pub(crate) fn scrub(&self, text: &str) -> String {
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
    fn keys_and_queries_go_and_the_rest_stays() {
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
            assert_eq!(secrets.scrub(text), expected);
        }
        assert!(!format!("{secrets:?}").contains("sk-secret"));
    }
}
