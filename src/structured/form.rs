//! [`Form`]: the JSON schema of a type, in the form that a request asks for.

use std::sync::Arc;

use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::request::schema::enforceable;
use crate::request::{ReplyType, Request, ResponseFormat};

/// The field for a value that is not an object, because providers enforce only objects.
pub(super) const VALUE: &str = "value";
/// The default field for the array of a list.
pub(super) const ITEMS: &str = "items";

/// The form that a reply must have, which is always an object.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Form {
    name: String,
    schema: Value,
    /// Names in the digest whether a value or a list is asked for.
    shape: String,
    /// Whether the value is in the field [`VALUE`].
    pub(super) wrapped: bool,
}

impl Form {
    /// Makes the form of one `T`.
    pub(super) fn of<T: JsonSchema>() -> Self {
        let (schema, definitions) = parts::<T>();
        let root = root(schema, &definitions);
        let wrapped = root.get("type") != Some(&json!("object"));
        let root = if wrapped { field(VALUE, root) } else { root };
        Self {
            name: T::schema_name().into_owned(),
            schema: with_definitions(root, definitions),
            shape: "value".to_owned(),
            wrapped,
        }
    }

    /// Makes the form of a list of `T`, in an array in that field.
    pub(super) fn list_of<T: JsonSchema>(name: Option<&str>) -> Self {
        let (schema, definitions) = parts::<T>();
        let array = json!({"type": "array", "items": schema});
        Self {
            name: format!("List_of_{}", T::schema_name()),
            schema: with_definitions(field(name.unwrap_or(ITEMS), array), definitions),
            shape: match name {
                Some(name) => format!("list in {name}"),
                None => "list".to_owned(),
            },
            wrapped: false,
        }
    }

    /// Makes a request ask for this form. Each deployment sends the schema in the provider's own field if the provider
    /// enforces it, else in the prompt. A request with a response format of its own is left as it is.
    pub(super) fn ask(&self, mut request: Request) -> Request {
        if request.response_format == ResponseFormat::Text {
            request.reply_type = Some(Arc::new(self.reply_type()));
        }
        request
    }

    fn reply_type(&self) -> ReplyType {
        let mut schema = self.schema.clone();
        strict(&mut schema);
        let is_enforceable = enforceable(&schema, &[]).closed;
        ReplyType {
            shape: self.shape.clone(),
            enforceable: is_enforceable.then(|| (self.name.clone(), schema)),
            prompt: format!(
                "Answer with JSON alone, without prose and code fences, that satisfies this JSON \
                 schema:\n{}",
                self.schema
            ),
        }
    }
}

fn parts<T: JsonSchema>() -> (Value, Map<String, Value>) {
    let mut generator = SchemaGenerator::default();
    let schema = generator.subschema_for::<T>().to_value();
    (schema, generator.take_definitions(true))
}

/// Resolves a schema that is a reference, because providers require an object.
fn root(schema: Value, definitions: &Map<String, Value>) -> Value {
    let reference = schema.get("$ref").and_then(Value::as_str);
    let name = reference.and_then(|path| path.strip_prefix("#/$defs/"));
    name.and_then(|name| definitions.get(name))
        .cloned()
        .unwrap_or(schema)
}

fn field(name: &str, schema: Value) -> Value {
    let mut properties = Map::new();
    properties.insert(name.to_owned(), schema);
    json!({"type": "object", "properties": properties, "required": [name]})
}

/// Adds those definitions to the root that are referred to.
fn with_definitions(mut root: Value, mut definitions: Map<String, Value>) -> Value {
    loop {
        let text = format!("{root}{}", Value::Object(definitions.clone()));
        let before = definitions.len();
        definitions.retain(|name, _| text.contains(&format!("\"#/$defs/{name}\"")));
        if definitions.len() == before {
            break;
        }
    }
    if let (Value::Object(root), false) = (&mut root, definitions.is_empty()) {
        root.insert("$defs".into(), definitions.into());
    }
    root
}

/// Makes a schema fit for strict modes: every property is required, there are no defaults, and a `$ref` stands alone. An
/// `Option` may be null already.
fn strict(schema: &mut Value) {
    let Value::Object(object) = schema else {
        return;
    };
    object.remove("default");
    if object.len() > 1
        && let Some(reference) = object.remove("$ref")
    {
        object.insert("anyOf".into(), json!([{ "$ref": reference }]));
    }
    if let Some(Value::Object(properties)) = object.get("properties") {
        let all: Vec<&String> = properties.keys().collect();
        let all = json!(all);
        object.insert("required".into(), all);
    }
    for (keyword, value) in object.iter_mut() {
        match (keyword.as_str(), value) {
            ("properties" | "$defs", Value::Object(parts)) => {
                parts.values_mut().for_each(strict);
            }
            ("anyOf" | "oneOf" | "allOf" | "prefixItems", Value::Array(parts)) => {
                parts.iter_mut().for_each(strict);
            }
            ("items" | "additionalProperties", part) => strict(part),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use serde::Deserialize;

    use super::*;
    use crate::call::Deployment;
    use crate::error::Result;
    use crate::provider::{Capabilities, Provider};
    use crate::request::Reply;

    #[derive(Deserialize, JsonSchema)]
    #[allow(dead_code)]
    struct Node {
        /// Its name.
        name: Option<String>,
        #[serde(default)]
        weight: u8,
        /// Below it.
        next: Option<Box<Node>>,
    }

    #[test]
    fn strict_requires_every_property_and_isolates_references() {
        let form = Form::of::<Node>();
        let mut schema = form.schema.clone();
        strict(&mut schema);
        assert!(!form.wrapped);
        assert_eq!(schema["required"], json!(["name", "next", "weight"]));
        assert_eq!(
            schema["properties"]["name"]["type"],
            json!(["string", "null"])
        );
        assert_eq!(schema["properties"]["weight"].get("default"), None);
        let node = &schema["$defs"]["Node"];
        assert_eq!(node["required"], schema["required"]);
        let fit = enforceable(&schema, &[]);
        assert!(fit.closed && fit.all_required, "{:#}", fit.schema);
    }

    #[test]
    fn a_type_that_is_not_an_object_is_wrapped_in_one() {
        let form = Form::of::<Vec<u32>>();
        assert!(form.wrapped);
        assert_eq!(form.schema["properties"]["value"]["type"], "array");
        let list = Form::list_of::<Node>(Some("nodes"));
        let items = &list.schema["properties"]["nodes"]["items"];
        assert_eq!(items["$ref"], "#/$defs/Node");
        assert!(list.schema["$defs"]["Node"].is_object());
    }

    /// A provider with these capabilities, of which only those are needed.
    struct Capable(Capabilities);

    #[async_trait::async_trait]
    impl Provider for Capable {
        fn name(&self) -> &str {
            "capable"
        }

        async fn generate(&self, _: &Request) -> Result<Reply> {
            unreachable!("no call is made")
        }

        fn capabilities(&self) -> Capabilities {
            self.0
        }
    }

    #[test]
    fn the_schema_is_in_the_providers_field_if_it_is_enforced_and_else_in_the_prompt() {
        let enforces = Capabilities::default().with_json(true);
        let ask = |form: Form, can| {
            let asked = form.ask(Request::new("a"));
            let adapted = Deployment::new(Capable(can)).adapt(&asked).unwrap();
            assert_eq!(adapted.digest(), asked.digest());
            adapted
        };
        let native = ask(Form::of::<Node>(), enforces);
        assert!(matches!(
            native.response_format,
            ResponseFormat::JsonSchema { .. }
        ));
        assert_eq!(native.messages.len(), 1);

        // A map has no fixed shape, so no provider enforces it.
        let map = ask(Form::of::<HashMap<String, Node>>(), enforces);
        assert_eq!(map.response_format, ResponseFormat::Json);
        let plain = ask(Form::of::<Node>(), Capabilities::default());
        assert_eq!(plain.response_format, ResponseFormat::Text);
        for request in [map, plain] {
            assert!(request.messages[0].content.contains("Its name"));
        }
        let own = Request::new("a").response_format(ResponseFormat::Json);
        assert_eq!(Form::of::<Node>().ask(own.clone()), own);
    }
}
