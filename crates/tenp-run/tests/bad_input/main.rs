//! Bad input: a message that names what is wrong and what helps, the right exit code, the input as it was, and nothing
//! left behind.

mod changing;
mod checkpoints;
mod data;
mod dern;
mod fp8;
#[path = "../../../tenp-checkpoint/tests/support/fp8.rs"]
mod fp8_folder;
mod links;
mod moments;
mod options;
mod outputs;
mod plans;
#[path = "../support/mod.rs"]
mod support;
mod table;
mod weights;

use std::path::{Path, PathBuf};

use support::fixtures::{copy, demo, golden, snapshot};
use support::{Scratch, tenp};

/// Exit code of work that failed.
const FAILED: i32 = 1;
/// Exit code of a command line that cannot be carried out.
const USAGE: i32 = 2;

/// Exit code of a machine or a build that lacks something.
const ENVIRONMENT: i32 = 3;

/// A copy of a checkpoint to damage, in a folder of its own.
struct Place {
    scratch: Scratch,
    model: PathBuf,
}

impl Place {
    fn golden(name: &str) -> Self {
        Self::of(&golden(name))
    }

    fn demo() -> Self {
        Self::of(&demo())
    }

    fn of(from: &Path) -> Self {
        let scratch = Scratch::new();
        let model = copy(from, &scratch.join("model"));
        Self { scratch, model }
    }

    fn join(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// The command is refused, says all of `needles`, and every file is as it was.
    #[track_caller]
    fn refuses(&self, line: &str, paths: &[&Path], code: i32, needles: &[&str]) {
        let before = snapshot(self.scratch.path());
        let run = tenp(line, paths);
        run.refused(code, needles);
        let after = snapshot(self.scratch.path());
        run.check(
            before.keys().eq(after.keys()),
            &format!("files came or went: {:?}", after.keys()),
        );
        run.check(before == after, "a file changed");
    }

    /// Like [`Self::refuses`] for commands that read the checkpoint whole.
    #[track_caller]
    fn refuses_everywhere(&self, needles: &[&str]) {
        let ids = golden("olmoe").join("golden.safetensors");
        let out = self.join("out");
        let model = self.model.as_path();
        for (line, paths) in [
            ("calibrate {} --data {} -o {}", &[model, &ids, &out][..]),
            ("prune {} --data {} --keep 0.6 -o {}", &[model, &ids, &out]),
            (
                "prune {} --data {} --keep 0.6 -o {} --dry-run",
                &[model, &ids, &out],
            ),
            ("eval {} --text {} --json", &[model, &ids]),
            ("logits {} --input {} --output {}", &[model, &ids, &out]),
        ] {
            self.refuses(line, paths, FAILED, needles);
        }
    }
}
