//! `include/tenp.h` and the library say the same: functions with the types of their arguments, structures with their
//! fields, constants with their values; and C and C++ compilers take the header and lay it out as Rust does.

mod compiler;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use compiler::{HEADER, compile, folder, library, run};

/// The header without comments.
fn header() -> String {
    let mut text = std::fs::read_to_string(HEADER).unwrap();
    while let Some(begin) = text.find("/*") {
        let end = begin + text[begin..].find("*/").unwrap() + 2;
        text.replace_range(begin..end, " ");
    }
    text
}

fn rust_sources() -> String {
    ["status", "types", "moe", "cpu", "gpu"]
        .map(|name| {
            let path = format!("{}/src/{name}.rs", env!("CARGO_MANIFEST_DIR"));
            std::fs::read_to_string(path).unwrap()
        })
        .concat()
}

/// A C declaration such as `const float *x` as Rust writes it: name and type.
fn rust_of(declaration: &str) -> (String, String) {
    let spaced = declaration.replace('*', " * ");
    let mut words: Vec<&str> = spaced.split_whitespace().collect();
    let name = words.pop().expect("a name").to_string();
    let is_const = words[0] == "const";
    let base = words[usize::from(is_const)];
    let base = match base {
        "size_t" => "usize",
        "uint32_t" => "u32",
        "int32_t" => "i32",
        "int64_t" => "i64",
        "float" => "f32",
        "double" => "f64",
        "void" => "c_void",
        "char" => "c_char",
        own => own,
    };
    let stars = words.iter().filter(|&&word| word == "*").count();
    let pointer = if is_const { "*const " } else { "*mut " };
    (name, format!("{}{base}", pointer.repeat(stars)))
}

/// Of every function its arguments and result, in Rust's words.
fn functions_of_header() -> BTreeMap<String, (Vec<(String, String)>, String)> {
    let text = header();
    let mut functions = BTreeMap::new();
    for statement in text.split(';') {
        let statement = statement.rsplit(['{', '}']).next().unwrap();
        let Some((head, arguments)) = statement.split_once('(') else {
            continue;
        };
        let head = head.lines().last().unwrap();
        let (name, result) = rust_of(head);
        let arguments = arguments.trim_end().trim_end_matches(')').trim();
        let arguments = match arguments {
            "void" => Vec::new(),
            some => some.split(',').map(rust_of).collect(),
        };
        functions.insert(name, (arguments, result));
    }
    functions
}

fn functions_of_rust() -> BTreeMap<String, (Vec<(String, String)>, String)> {
    let text = rust_sources();
    let mut functions = BTreeMap::new();
    for part in text.split("#[unsafe(no_mangle)]").skip(1) {
        let signature = part.split_once("extern \"C\" fn ").expect("a C function").1;
        let (name, rest) = signature.split_once('(').unwrap();
        let (arguments, rest) = rest.split_once(')').unwrap();
        let result = rest.split_once("-> ").unwrap().1;
        let result = result.split_once(" {").unwrap().0;
        let arguments = arguments
            .split(',')
            .map(str::trim)
            .filter(|argument| !argument.is_empty())
            .map(|argument| {
                let (name, ty) = argument.split_once(": ").unwrap();
                (name.to_string(), ty.to_string())
            })
            .collect();
        functions.insert(name.to_string(), (arguments, result.to_string()));
    }
    functions
}

#[test]
fn functions_have_the_same_names_and_types() {
    let (c, rust) = (functions_of_header(), functions_of_rust());
    assert!(c.len() >= 13, "{c:?}");
    assert_eq!(c, rust);
}

/// Fields of every structure, in Rust's words.
type Structures = BTreeMap<String, Vec<(String, String)>>;

fn structures_of_header() -> Structures {
    let text = header();
    let parts = text.split("typedef struct ").skip(1);
    parts
        .filter_map(|part| part.split_once('{'))
        .filter(|(head, _)| !head.contains(';'))
        .map(|(name, rest)| {
            let fields = rest.split_once('}').unwrap().0;
            let fields = fields.split(';').map(str::trim).filter(|f| !f.is_empty());
            (name.trim().to_string(), fields.map(rust_of).collect())
        })
        .collect()
}

fn structures_of_rust() -> Structures {
    let text = rust_sources();
    let parts = text.split("#[repr(C)]").skip(1);
    parts
        .map(|part| {
            let (head, rest) = part.split_once(" {\n").unwrap();
            let name = head.split_once("pub struct ").unwrap().1;
            let fields = rest.split_once("\n}").unwrap().0.lines();
            let fields = fields.filter_map(|line| line.trim().strip_prefix("pub "));
            let fields = fields.map(|field| {
                let (name, ty) = field.trim_end_matches(',').split_once(": ").unwrap();
                (name.to_string(), ty.to_string())
            });
            (name.to_string(), fields.collect())
        })
        .collect()
}

#[test]
fn structures_have_the_same_fields() {
    let (c, rust) = (structures_of_header(), structures_of_rust());
    assert_eq!(c.len(), 5, "{c:?}");
    assert_eq!(c, rust);
}

fn constants_of_header() -> BTreeMap<String, i32> {
    let text = header();
    let parts = text.split("enum {").skip(1);
    let entries = parts.flat_map(|part| part.split_once('}').unwrap().0.split(','));
    entries
        .map(|entry| {
            let (name, value) = entry.split_once('=').expect("a value of its own");
            (name.trim().to_string(), value.trim().parse().unwrap())
        })
        .collect()
}

#[test]
fn constants_have_the_same_values() {
    let text = rust_sources();
    let rust: BTreeMap<String, i32> = text
        .lines()
        .filter_map(|line| line.strip_prefix("pub const ")?.split_once(": tenp_"))
        .map(|(name, rest)| {
            let value = rest.split_once("= ").unwrap().1.trim_end_matches(';');
            (name.to_string(), value.parse().unwrap())
        })
        .collect();
    let c = constants_of_header();
    assert_eq!(c.len(), 18, "{c:?}");
    assert_eq!(c, rust);
}

/// Sizes and offsets, as Rust has them, asserted by the C compiler; every function of the header, called by address.
fn probe() -> String {
    let mut text = String::from("#include \"tenp.h\"\n#include <stdio.h>\n");
    text += "#define HOLDS(name, what) typedef char name[(what) ? 1 : -1]\n";
    macro_rules! layout {
        ($($name:ident { $($field:ident),* })*) => {$(
            let name = stringify!($name);
            let size = size_of::<tenp::$name>();
            writeln!(text, "HOLDS({name}_size, sizeof({name}) == {size});").unwrap();
            $(
                let field = stringify!($field);
                let at = std::mem::offset_of!(tenp::$name, $field);
                writeln!(text, "HOLDS({name}_{field}, offsetof({name}, {field}) == {at});").unwrap();
            )*
        )*};
    }
    layout! {
        tenp_matrix { data, bytes, scales, scale_bytes, dtype }
        tenp_expert { gate, up, down }
        tenp_batch { x, x_len, expert_ids, expert_ids_len, weights, weights_len, num_tokens, top_k }
        tenp_weights_cuda { gate_up, gate_up_bytes, down, down_bytes, tables, tables_bytes }
        tenp_batch_cuda { x, x_bytes, expert_ids, expert_ids_len, weights, weights_len, num_tokens, top_k }
    }
    let sizes = [
        ("tenp_status", size_of::<tenp::tenp_status>()),
        ("tenp_dtype", size_of::<tenp::tenp_dtype>()),
        ("tenp_compute", size_of::<tenp::tenp_compute>()),
        ("tenp_stream", size_of::<tenp::tenp_stream>()),
    ];
    for (name, size) in sizes {
        writeln!(text, "HOLDS({name}_size, sizeof({name}) == {size});").unwrap();
    }
    text += "typedef void (*function)(void);\nint main(void) {\n  int found = 0;\n";
    for name in functions_of_header().keys() {
        writeln!(text, "  function volatile f_{name} = (function){name};").unwrap();
        writeln!(text, "  found += f_{name} != 0;").unwrap();
    }
    text += "  printf(\"%d functions\\n\", found);\n  return 0;\n}\n";
    text
}

#[test]
fn compilers_take_the_header_and_find_every_function() {
    let folder = folder();
    let expected = format!("{} functions\n", functions_of_header().len());
    for (extension, language) in [("c", "-std=c99"), ("cpp", "-std=c++11")] {
        let source = folder.path().join(format!("probe.{extension}"));
        std::fs::write(&source, probe()).unwrap();
        for kind in ["so", "a"] {
            let program = folder.path().join(format!("probe_{extension}_{kind}"));
            compile(language, &[&source], &library(kind), &program);
            assert_eq!(run(&program), expected);
        }
    }
}
