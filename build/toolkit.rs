//! Where nvcc is, and what it is asked to compile for: pure functions over an environment, shared by `build.rs` and by
//! the tests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Environment variables the choice of nvcc or of its options depends on.
pub(crate) const VARIABLES: [&str; 10] = [
    "TENP_NVCC",
    "NVCC",
    "CUDA_HOME",
    "CUDA_PATH",
    "PATH",
    "VIRTUAL_ENV",
    "TENP_CUDA_ARCHS",
    "TENP_NVCC_FLAGS",
    "NVCC_CCBIN",
    "DOCS_RS",
];

/// What is compiled when `TENP_CUDA_ARCHS` is not set: machine code for Hopper and for Ampere (which newer chips of
/// the same generation run too), and portable code that the driver compiles for anything later.
pub(crate) const DEFAULT_ARCHS: &str = "sm_90a,sm_80,compute_80";

const EXECUTABLE: &str = if cfg!(windows) { "nvcc.exe" } else { "nvcc" };

/// The machine as the search sees it.
pub(crate) struct Surroundings<'a> {
    /// Environment variables.
    pub(crate) env: &'a BTreeMap<String, String>,
    /// The package's own folder, which may hold `.cuda/`.
    pub(crate) package: &'a Path,
    /// Whether a path is a file.
    pub(crate) is_file: &'a dyn Fn(&Path) -> bool,
    /// Names in a folder; empty if there is no such folder.
    pub(crate) list: &'a dyn Fn(&Path) -> Vec<String>,
}

impl Surroundings<'_> {
    fn var(&self, name: &str) -> Option<&str> {
        self.env
            .get(name)
            .map(String::as_str)
            .filter(|v| !v.is_empty())
    }

    /// `site-packages/nvidia/cu13/bin/nvcc` of a Python environment, the newest interpreter first.
    fn in_python(&self, root: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for lib in ["lib", "lib64", "Lib"] {
            let lib = root.join(lib);
            let mut pythons: Vec<String> = (self.list)(&lib)
                .into_iter()
                .filter(|name| name.starts_with("python"))
                .collect();
            pythons.sort_by_key(|name| std::cmp::Reverse((name.len(), name.clone())));
            let folders = pythons
                .into_iter()
                .map(|p| lib.join(p))
                .chain([lib.clone()]);
            found.extend(folders.map(|f| f.join("site-packages/nvidia/cu13/bin").join(EXECUTABLE)));
        }
        found
    }

    /// Every place nvcc may be, in the order they are tried, with the name of the place.
    fn candidates(&self) -> Vec<(String, PathBuf)> {
        let mut places = Vec::new();
        for name in ["CUDA_HOME", "CUDA_PATH"] {
            if let Some(root) = self.var(name) {
                places.push((
                    name.to_string(),
                    Path::new(root).join("bin").join(EXECUTABLE),
                ));
            }
        }
        if let Some(path) = self.var("PATH") {
            places.extend(
                std::env::split_paths(path).map(|dir| ("PATH".to_string(), dir.join(EXECUTABLE))),
            );
        }
        let usual = Path::new("/usr/local/cuda/bin").join(EXECUTABLE);
        places.push((usual.display().to_string(), usual));
        let local = self.package.join(".cuda");
        places.extend(
            self.in_python(&local)
                .into_iter()
                .map(|p| (".cuda".to_string(), p)),
        );
        if let Some(root) = self.var("VIRTUAL_ENV") {
            let found = self.in_python(Path::new(root));
            places.extend(found.into_iter().map(|p| ("VIRTUAL_ENV".to_string(), p)));
        }
        places
    }
}

/// Finds nvcc.
///
/// Order: `TENP_NVCC`, `NVCC` (both must name a file), `CUDA_HOME`, `CUDA_PATH`, `PATH`, `/usr/local/cuda`, the
/// project's `.cuda/` and an active Python environment with the compiler's wheels.
///
/// # Errors
/// A message that says where it looked and how to get one.
pub(crate) fn find_nvcc(around: &Surroundings<'_>) -> Result<PathBuf, String> {
    for name in ["TENP_NVCC", "NVCC"] {
        if let Some(path) = around.var(name) {
            let path = PathBuf::from(path);
            if (around.is_file)(&path) {
                return Ok(path);
            }
            return Err(format!("{name} is {}, which is not a file", path.display()));
        }
    }
    let candidates = around.candidates();
    if let Some((_, path)) = candidates.iter().find(|(_, path)| (around.is_file)(path)) {
        return Ok(path.clone());
    }
    let mut places: Vec<&str> = candidates.iter().map(|(place, _)| place.as_str()).collect();
    places.dedup();
    Err(format!(
        "the feature `cuda` needs nvcc (CUDA 13.0 or later) and none was found in TENP_NVCC, NVCC, {}. \
         `scripts/install-nvcc.sh` puts one into .cuda/ without root, or name one with TENP_NVCC=/path/to/nvcc",
        places.join(", ")
    ))
}

/// One thing the kernels are compiled for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Machine code of one architecture: "90a".
    Machine(String),
    /// Portable code for this architecture and all later ones: "80".
    Portable(String),
}

impl Target {
    /// nvcc's option for it.
    pub(crate) fn gencode(&self) -> String {
        match self {
            Self::Machine(arch) => format!("arch=compute_{arch},code=sm_{arch}"),
            Self::Portable(arch) => format!("arch=compute_{arch},code=compute_{arch}"),
        }
    }

    /// The name it is given in `TENP_CUDA_ARCHS`.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Machine(arch) => format!("sm_{arch}"),
            Self::Portable(arch) => format!("compute_{arch}"),
        }
    }
}

/// What a source is compiled for: all targets, but sources named `*_sm90` use instructions of sm_90a alone.
pub(crate) fn targets_of<'a>(stem: &str, targets: &'a [Target]) -> Vec<&'a Target> {
    let only_hopper = stem.ends_with("_sm90");
    targets
        .iter()
        .filter(|target| !only_hopper || **target == Target::Machine("90a".to_string()))
        .collect()
}

/// Reads a list such as `sm_90a,sm_80,compute_80` (separated by commas or spaces; `90a` means `sm_90a`).
///
/// # Errors
/// What is wrong with the list: empty, not an architecture, older than 80, or portable code of an architecture whose
/// features are not portable.
pub(crate) fn parse_archs(list: &str) -> Result<Vec<Target>, String> {
    let mut targets = Vec::new();
    for word in list.split([',', ' ', ';']).filter(|w| !w.is_empty()) {
        let (arch, portable) = match word.strip_prefix("compute_") {
            Some(arch) => (arch, true),
            None => (word.strip_prefix("sm_").unwrap_or(word), false),
        };
        let digits = arch.trim_end_matches(['a', 'f']);
        let number: u32 = digits.parse().map_err(|_| {
            format!(
                "TENP_CUDA_ARCHS: {word:?} is no architecture (examples: sm_90a, sm_80, compute_80)"
            )
        })?;
        if number < 80 {
            return Err(format!(
                "TENP_CUDA_ARCHS: {word} is older than sm_80; the kernels use cp.async and bf16 mma, which begin there"
            ));
        }
        if portable && arch != digits {
            return Err(format!(
                "TENP_CUDA_ARCHS: {word} runs on sm_{arch} alone, so it cannot be the portable code; write sm_{arch}"
            ));
        }
        let target = if portable {
            Target::Portable(arch.to_string())
        } else {
            Target::Machine(arch.to_string())
        };
        if !targets.contains(&target) {
            targets.push(target);
        }
    }
    if targets.is_empty() {
        return Err("TENP_CUDA_ARCHS names no architecture".to_string());
    }
    Ok(targets)
}

/// Whether a line of nvcc or ptxas is worth showing whoever builds: a warning, or a performance loss, which ptxas calls
/// information (wgmma that it runs one after another, for one).
pub(crate) fn is_warning(line: &str) -> bool {
    line.contains("warning") || line.contains("Potential Performance Loss")
}
