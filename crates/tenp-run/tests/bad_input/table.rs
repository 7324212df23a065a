//! The table of faults in the documentation names tests that exist.

use std::path::Path;

#[test]
fn every_row_has_its_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let text = std::fs::read_to_string(root.join("docs/faults.md")).unwrap();
    let mut rows = 0;
    for line in text.lines().filter(|line| line.contains(".rs::")) {
        let test = line.rsplit('`').nth(1).unwrap();
        let (file, name) = test.split_once("::").unwrap();
        let package = match file.split_once('/').unwrap().0 {
            "checkpoint" => "tenp-checkpoint",
            _ => "tenp-run",
        };
        let path = root.join("crates").join(package).join("tests").join(file);
        let source = std::fs::read_to_string(&path);
        let source = source.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let lines = source.lines().rev();
        let mut above = lines.skip_while(|line| *line != format!("fn {name}() {{"));
        assert!(above.next().is_some(), "{test} is not there");
        let mut attributes = above.take_while(|line| line.starts_with("#["));
        assert!(
            attributes.any(|line| line == "#[test]"),
            "{test} is no test"
        );
        rows += 1;
    }
    assert!(rows >= 40, "{rows} rows");
}
