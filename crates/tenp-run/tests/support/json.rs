//! Looking into JSON answers.

use serde_json::Value;

/// Keys of an object in their order.
#[track_caller]
pub(crate) fn keys(value: &Value) -> Vec<&str> {
    let object = value.as_object().expect("an object");
    object.keys().map(String::as_str).collect()
}

/// A number.
#[track_caller]
pub(crate) fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

/// The elements of an array.
#[track_caller]
pub(crate) fn list(value: &Value) -> &[Value] {
    value
        .as_array()
        .unwrap_or_else(|| panic!("{value} is no list"))
}

/// Widths of a plan, `[MoE layer][expert]`.
#[track_caller]
pub(crate) fn widths(plan: &Value) -> Vec<Vec<u64>> {
    let expert = |expert: &Value| expert["width"].as_u64().expect("a width");
    let layer = |layer: &Value| list(&layer["experts"]).iter().map(expert).collect();
    list(&plan["layers"]).iter().map(layer).collect()
}
