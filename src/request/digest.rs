//! [`RequestDigest`]: a stable name for the content of a request.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, ErrorKind};
use crate::request::Request;

/// A SHA-256 over the parts of a [`Request`] that determine its answer.
///
/// Two requests have the same digest if and only if model, messages, limits,
/// sampling, format and `extra` are equal. Timeouts do not count, nor does the order of the fields in `extra`, nor
/// whether a number was written `1` or `1.0`. A schema that `generate_as` and its siblings derive from a type does not
/// count; one that the caller sets does.
///
/// Stores keep digests, so their form is fixed: SHA-256 of `throughline/1` followed
/// by JSON without white space, with object keys sorted by their bytes. This is RFC 8785
/// except for numbers: integers keep all their digits. RFC 8785 rounds them to doubles,
/// and two seeds above 2⁵³ would share one answer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestDigest([u8; 32]);

impl RequestDigest {
    /// Makes a digest of its 32 bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Returns the 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl Request {
    /// Computes the digest of the request.
    ///
    /// ```
    /// use std::time::Duration;
    /// use throughline::Request;
    ///
    /// let request = Request::new("Name a river.").model("m");
    /// let patient = request.clone().timeout(Duration::from_secs(60));
    /// assert_eq!(request.digest(), patient.digest());
    /// assert_ne!(request.digest(), request.clone().max_tokens(5).digest());
    /// ```
    pub fn digest(&self) -> RequestDigest {
        let mut asked = Map::new();
        let mut put = |name: &str, value: Value| asked.insert(name.to_owned(), value);
        // All fields are named: a new one must be added here or left out on purpose.
        let Self {
            model,
            messages,
            max_tokens,
            temperature,
            stop,
            seed,
            response_format,
            extra,
            timeout: _,
            item_key: _,
            sample: _,
            reply_type,
            has_schema_prompt,
            asks_again: _,
        } = self;
        if let Some(model) = model {
            put("model", json!(&**model));
        }
        put(
            "messages",
            json!(messages[usize::from(*has_schema_prompt)..]),
        );
        if let Some(max_tokens) = max_tokens {
            put("max_tokens", json!(max_tokens));
        }
        if let Some(temperature) = temperature {
            let number = json!(temperature);
            // JSON cannot write NaN and infinities; a provider refuses them anyway.
            let odd = || json!(temperature.to_string());
            put("temperature", if number.is_null() { odd() } else { number });
        }
        if !stop.is_empty() {
            put("stop", json!(stop));
        }
        if let Some(seed) = seed {
            put("seed", json!(seed));
        }
        let format = match reply_type {
            // Differs from every response format that a caller can set.
            Some(reply_type) => json!({ "derived": reply_type.shape }),
            None => json!(response_format),
        };
        put("response_format", format);
        if !extra.is_empty() {
            put("extra", Value::Object(extra.clone()));
        }

        let mut canonical = String::from("throughline/1");
        write_canonical(&Value::Object(asked), &mut canonical);
        RequestDigest(Sha256::digest(canonical.as_bytes()).into())
    }
}

/// Writes JSON without white space and with sorted keys. It sorts them itself, because `serde_json` keeps the order of
/// insertion if any crate in the tree enables its feature `preserve_order`.
pub(crate) fn write_canonical(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_unstable_by(|a, b| a.0.cmp(b.0));
            out.push('{');
            for (i, (key, value)) in entries.into_iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write_canonical(&Value::String(key.clone()), out);
                out.push(':');
                write_canonical(value, out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write_canonical(item, out);
            }
            out.push(']');
        }
        Value::Number(number) => match number.as_f64() {
            // Below 2⁵³, a whole double and the integer are the same number.
            Some(float)
                if number.is_f64()
                    && float.fract() == 0.0
                    && float.abs() < 9_007_199_254_740_992.0 =>
            {
                out.push_str(&(float as i64).to_string());
            }
            _ => out.push_str(&number.to_string()),
        },
        scalar => out.push_str(&scalar.to_string()),
    }
}

impl fmt::Display for RequestDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for RequestDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RequestDigest({self})")
    }
}

impl FromStr for RequestDigest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || {
            Error::new(
                ErrorKind::Other,
                format!("a request digest is 64 hex digits, not {text:?}"),
            )
        };
        if text.len() != 64 || !text.is_ascii() {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digit = |c: u8| (c as char).to_digit(16).ok_or_else(wrong);
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for RequestDigest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RequestDigest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::request::ResponseFormat;

    fn full() -> Request {
        Request::new("Name a river. \u{1F30A} \"quoted\"\n")
            .system("One word.")
            .model("m-1")
            .max_tokens(10)
            .temperature(0.7)
            .stop("\n")
            .seed(u64::MAX)
            .response_format(ResponseFormat::JsonSchema {
                name: "river".into(),
                schema: json!({"type": "object", "a": [1, 2.5, null, true]}),
            })
            .extra("top_p", 0.9)
            .extra("n", 1)
    }

    /// Stores keep these: a change here is a change of format and needs `throughline/2`.
    #[test]
    fn golden() {
        assert_eq!(
            Request::new("hello").model("m").digest().to_string(),
            "28ce26bd92a4b47cfc69b79d72dd79c5d86b19ba56020928c1c5fd0850c0b2e9"
        );
        assert_eq!(
            full().digest().to_string(),
            "9c3ba60bad9011b6be7ce8e99727c29907f2afd9ef0d8d4a36687f8f9038cded"
        );
    }

    #[test]
    fn every_field_that_changes_the_answer_changes_the_digest() {
        let base = full();
        let changed = [
            base.clone().model("m-2"),
            base.clone().system("Two words."),
            base.clone().max_tokens(11),
            base.clone().temperature(0.71),
            base.clone().stop("x"),
            base.clone().seed(u64::MAX - 1),
            base.clone().response_format(ResponseFormat::Json),
            base.clone().extra("top_p", 0.8),
            base.clone().extra("new", Value::Null),
            base.clone().temperature(f64::NAN),
            base.clone().temperature(f64::INFINITY),
        ];
        let mut digests: Vec<_> = changed.iter().map(Request::digest).collect();
        digests.push(base.digest());
        digests.sort();
        digests.dedup();
        assert_eq!(digests.len(), 12);
    }

    #[test]
    fn parts_that_do_not_change_the_answer_do_not_change_the_digest() {
        let mut other = full().timeout(Duration::from_secs(9));
        other.item_key = Some("k".into());
        let n = other.extra.remove("n").unwrap();
        assert_eq!(n, json!(1));
        let other = other.extra("n", 1.0);
        assert_eq!(other.digest(), full().digest());
    }

    #[test]
    fn text_form_round_trips_and_rejects_the_rest() {
        let digest = full().digest();
        assert_eq!(digest.to_string().parse::<RequestDigest>().unwrap(), digest);
        let json = serde_json::to_string(&digest).unwrap();
        assert_eq!(
            serde_json::from_str::<RequestDigest>(&json).unwrap(),
            digest
        );
        for wrong in ["", "ab", &"g".repeat(64), &"é".repeat(32), &"+1".repeat(32)] {
            assert!(wrong.parse::<RequestDigest>().is_err(), "{wrong}");
        }
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((".{0,4}", inner), 0..4)
                    .prop_map(|entries| Value::Object(entries.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// The canonical form is JSON again and means the same; so different values
        /// cannot share a form.
        #[test]
        fn canonical_form_keeps_the_value(value in json_value()) {
            let mut text = String::new();
            write_canonical(&value, &mut text);
            let back: Value = serde_json::from_str(&text).unwrap();
            let mut again = String::new();
            write_canonical(&back, &mut again);
            prop_assert_eq!(text, again);
        }
    }
}
