//! Reduces JSON schemas to the subset that providers enforce.
//!
//! Providers compile a schema into a grammar and refuse schemas that they cannot compile: an
//! object must be closed, and bounds and formats that they do not know must be absent. The
//! removed keywords still hold where the reply is parsed.

use serde_json::{Map, Value, json};

/// A reduced schema, and whether providers enforce it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Enforced {
    pub(crate) schema: Value,
    /// Every part has a fixed shape: there are no maps and no free JSON. Providers enforce only such schemas.
    pub(crate) closed: bool,
    /// Every property is required, as OpenAI's strict mode demands.
    pub(crate) all_required: bool,
}

/// Closes the schema's objects, and removes numbers' formats (`uint64`) and the
/// `unsupported` keywords.
pub(crate) fn enforceable(schema: &Value, unsupported: &[&str]) -> Enforced {
    let mut enforced = Enforced {
        schema: schema.clone(),
        closed: true,
        all_required: true,
    };
    let mut schema = enforced.schema.take();
    enforced.visit(&mut schema, unsupported);
    enforced.schema = schema;
    enforced
}

impl Enforced {
    fn visit(&mut self, schema: &mut Value, unsupported: &[&str]) {
        let Value::Object(schema) = schema else {
            self.closed &= *schema != Value::Bool(true);
            return;
        };
        schema.retain(|keyword, _| !unsupported.contains(&keyword.as_str()));
        if !matches!(schema.get("type"), Some(Value::String(word)) if word == "string") {
            schema.remove("format");
        }
        if let Some(variants) = schema.remove("oneOf") {
            schema.entry("anyOf").or_insert(variants);
        }
        let shaped = ["type", "$ref", "anyOf", "allOf", "enum", "const"];
        self.closed &= shaped.iter().any(|keyword| schema.contains_key(*keyword));
        if schema.get("type") == Some(&json!("object")) || schema.contains_key("properties") {
            self.close(schema);
        }

        for (keyword, value) in schema.iter_mut() {
            match (keyword.as_str(), value) {
                ("properties" | "$defs" | "definitions", Value::Object(parts)) => {
                    parts
                        .values_mut()
                        .for_each(|part| self.visit(part, unsupported));
                }
                ("anyOf" | "allOf" | "prefixItems", Value::Array(parts)) => {
                    parts
                        .iter_mut()
                        .for_each(|part| self.visit(part, unsupported));
                }
                ("items", part) => self.visit(part, unsupported),
                _ => {}
            }
        }
    }

    fn close(&mut self, object: &mut Map<String, Value>) {
        self.closed &= object.contains_key("properties");
        let additional = object.entry("additionalProperties").or_insert(json!(false));
        self.closed &= *additional == json!(false);
        let required = object.get("required").and_then(Value::as_array);
        let is_required = |name: &String| {
            required.is_some_and(|required| required.iter().any(|r| r.as_str() == Some(name)))
        };
        let properties = object.get("properties").and_then(Value::as_object);
        self.all_required &= properties.is_none_or(|all| all.keys().all(is_required));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_closed_and_unsupported_keywords_removed_but_not_properties_of_that_name() {
        let schema = json!({
            "type": "object",
            "properties": {
                "minimum": {"type": "integer", "format": "uint64", "minimum": 0},
                "when": {"type": "string", "format": "date"},
                "kind": {"oneOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]},
            },
            "required": ["minimum", "when", "kind"],
            "$defs": {"A": {"type": "object", "properties": {"x": {"type": "string"}}}},
        });
        let enforced = enforceable(&schema, &["minimum"]);
        assert_eq!(
            enforced.schema,
            json!({
                "type": "object",
                "properties": {
                    "minimum": {"type": "integer"},
                    "when": {"type": "string", "format": "date"},
                    "kind": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]},
                },
                "required": ["minimum", "when", "kind"],
                "additionalProperties": false,
                "$defs": {"A": {
                    "type": "object",
                    "properties": {"x": {"type": "string"}},
                    "additionalProperties": false,
                }},
            })
        );
        assert!(enforced.closed && !enforced.all_required);
    }

    #[test]
    fn maps_and_free_json_are_not_closed() {
        for open in [
            json!({"type": "object", "additionalProperties": {"type": "integer"}}),
            json!({"type": "object", "properties": {"any": true}}),
            json!({"type": "array", "items": {}}),
            json!(true),
        ] {
            assert!(!enforceable(&open, &[]).closed, "{open}");
        }
        assert!(enforceable(&json!({"type": "string"}), &[]).closed);
    }
}
