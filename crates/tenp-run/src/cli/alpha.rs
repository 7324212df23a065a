//! `--alpha`.

use std::str::FromStr;

/// Share of whole experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum AlphaArg {
    Share(f64),
    /// By trying on held-out calibration text.
    Search,
}

impl FromStr for AlphaArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "search" => Ok(Self::Search),
            _ => text
                .parse()
                .map(Self::Share)
                .map_err(|_| format!("`{text}` is neither a share, such as 0.2, nor `search`")),
        }
    }
}
