//! The search for nvcc and the list of architectures, as `build.rs` does them, over invented machines.

#[allow(dead_code, reason = "build.rs uses the rest")]
#[path = "../build/toolkit.rs"]
mod toolkit;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toolkit::{DEFAULT_ARCHS, Surroundings, VARIABLES, find_nvcc, is_warning, parse_archs};

/// Looks for nvcc on a machine with these variables and these files.
fn search(env: &[(&str, &str)], files: &[&str]) -> Result<PathBuf, String> {
    let env: BTreeMap<String, String> = env
        .iter()
        .map(|(k, v)| ((*k).to_string(), (*v).to_string()))
        .collect();
    assert!(
        env.keys().all(|k| VARIABLES.contains(&k.as_str())),
        "unwatched variable"
    );
    let is_file = |path: &Path| files.iter().any(|f| Path::new(f) == path);
    let list = |folder: &Path| -> Vec<String> {
        let inside = files
            .iter()
            .filter_map(|f| Path::new(f).strip_prefix(folder).ok());
        inside
            .filter_map(|rest| Some(rest.components().next()?.as_os_str().to_str()?.to_string()))
            .collect()
    };
    find_nvcc(&Surroundings {
        env: &env,
        package: Path::new("/pkg"),
        is_file: &is_file,
        list: &list,
    })
}

const WHEEL: &str = "/pkg/.cuda/lib/python3.11/site-packages/nvidia/cu13/bin/nvcc";

#[test]
fn places_are_tried_in_their_order() {
    // Each place in turn is the first that exists: taking the winner away hands over to the next.
    let env = [
        ("TENP_NVCC", "/a/nvcc"),
        ("NVCC", "/b/nvcc"),
        ("CUDA_HOME", "/c"),
        ("CUDA_PATH", "/d"),
        ("PATH", "/usr/bin:/e"),
        ("VIRTUAL_ENV", "/venv"),
    ];
    let files = [
        "/a/nvcc",
        "/b/nvcc",
        "/c/bin/nvcc",
        "/d/bin/nvcc",
        "/e/nvcc",
        "/usr/local/cuda/bin/nvcc",
        WHEEL,
        "/venv/lib/python3.12/site-packages/nvidia/cu13/bin/nvcc",
    ];
    for first in 0..files.len() {
        let found = search(&env[first.min(2)..], &files[first..]);
        assert_eq!(found, Ok(PathBuf::from(files[first])));
    }
}

#[test]
fn a_named_compiler_must_exist() {
    for name in ["TENP_NVCC", "NVCC"] {
        let error = search(&[(name, "/gone/nvcc")], &[WHEEL]).unwrap_err();
        assert!(
            error.contains(name) && error.contains("/gone/nvcc"),
            "{error}"
        );
    }
    // An empty variable is as good as none.
    assert_eq!(
        search(&[("TENP_NVCC", ""), ("CUDA_HOME", "")], &[WHEEL]),
        Ok(WHEEL.into())
    );
}

#[test]
fn the_newest_python_of_an_environment_wins() {
    let old = "/pkg/.cuda/lib/python3.9/site-packages/nvidia/cu13/bin/nvcc";
    assert_eq!(search(&[], &[old, WHEEL]), Ok(WHEEL.into()));
    let plain = "/pkg/.cuda/lib/python3/site-packages/nvidia/cu13/bin/nvcc";
    assert_eq!(search(&[], &[plain]), Ok(plain.into()));
}

#[test]
fn without_a_compiler_the_message_says_how_to_get_one() {
    let error = search(&[("PATH", "/usr/bin"), ("CUDA_HOME", "/opt/cuda")], &[]).unwrap_err();
    for word in [
        "CUDA_HOME",
        "PATH",
        "/usr/local/cuda",
        "install-nvcc.sh",
        "TENP_NVCC",
    ] {
        assert!(error.contains(word), "{word} in: {error}");
    }
}

#[test]
fn architectures_become_options() {
    let options = |list: &str| -> Vec<String> {
        parse_archs(list)
            .unwrap()
            .iter()
            .map(toolkit::Target::gencode)
            .collect()
    };
    assert_eq!(
        options(DEFAULT_ARCHS),
        [
            "arch=compute_90a,code=sm_90a",
            "arch=compute_80,code=sm_80",
            "arch=compute_80,code=compute_80"
        ]
    );
    assert_eq!(options("90a 80"), options("sm_90a,sm_80"));
    assert_eq!(
        options("sm_100f, compute_90")[1],
        "arch=compute_90,code=compute_90"
    );
    assert_eq!(options("80,80,sm_80").len(), 1);
    let names: Vec<String> = parse_archs(DEFAULT_ARCHS)
        .unwrap()
        .iter()
        .map(toolkit::Target::name)
        .collect();
    assert_eq!(names.join(","), DEFAULT_ARCHS);
}

#[test]
fn wrong_architectures_are_refused_with_the_reason() {
    for (list, reason) in [
        ("", "names no architecture"),
        (" , ", "names no architecture"),
        ("hopper", "no architecture"),
        ("sm_75", "older than sm_80"),
        ("compute_90a", "write sm_90a"),
        ("80-real", "no architecture"),
    ] {
        let error = parse_archs(list).unwrap_err();
        assert!(error.contains(reason), "{list:?}: {error}");
    }
}

#[test]
fn losses_that_ptxas_calls_information_are_shown() {
    for (line, shown) in [
        (
            "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to \
             insufficient register resources for the wgmma pipeline in the function 'f'",
            true,
        ),
        (
            "kernels/cuda/rows.cu(12): warning #177-D: variable \"x\" was declared but never referenced",
            true,
        ),
        (
            "ptxas info    : (C7519) warpgroup.arrive is injected in around line 9 by compiler",
            false,
        ),
        ("", false),
    ] {
        assert_eq!(is_warning(line), shown, "{line}");
    }
}
