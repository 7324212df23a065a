//! Statistics of a share of a calibration's samples, to be merged with those of the other shares.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Statistics;

/// One share of the samples of a calibration.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
pub struct Share {
    /// Fingerprint of all the samples.
    pub of_text: String,
    /// Which share, from 1.
    pub part: u32,
    /// Shares in all.
    pub parts: u32,
}

impl Share {
    /// Shares in all, at most: what a file says of others bounds what is listed as missing.
    pub const MAX_PARTS: u32 = 1 << 16;
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.part, self.parts)
    }
}

impl Statistics {
    /// Shares that are not in the statistics although others of the same calibration are.
    pub fn missing_shares(&self) -> Vec<Share> {
        let there: BTreeSet<&Share> = self.shares.iter().collect();
        let shares = self.splits().into_iter().flat_map(|(of_text, parts)| {
            (1..=parts).map(move |part| Share {
                of_text: of_text.to_owned(),
                part,
                parts,
            })
        });
        shares.filter(|share| !there.contains(share)).collect()
    }

    /// Texts that shares are of, with the number of shares of each.
    fn splits(&self) -> BTreeSet<(&str, u32)> {
        let shares = self.shares.iter();
        let splits = shares.map(|share| (share.of_text.as_str(), share.parts));
        splits.collect()
    }

    /// The first reason why no such shares can have been calibrated.
    pub(super) fn check_own_shares(&self) -> Result<(), String> {
        let exists = |share: &Share| (1..=share.parts).contains(&share.part);
        if let Some(share) = self.shares.iter().find(|share| !exists(share)) {
            return Err(format!("there is no share {share}; calibrate again"));
        }
        let splits = self.splits().into_iter();
        let all: u64 = splits.map(|(_, parts)| u64::from(parts)).sum();
        if all > u64::from(Share::MAX_PARTS) {
            return Err(format!(
                "its shares are of {all} in all, more than the {} there may be; calibrate in fewer shares",
                Share::MAX_PARTS
            ));
        }
        Ok(())
    }

    /// Whether the two hold different shares of one calibration.
    pub(super) fn shares_text_with(&self, other: &Self) -> bool {
        let own = |share: &Share| self.shares.iter().any(|o| o.of_text == share.of_text);
        other.shares.iter().any(own)
    }

    /// Adds shares; a calibration that is whole is no longer listed.
    pub(super) fn add_shares(&mut self, mut shares: Vec<Share>) {
        self.shares.append(&mut shares);
        self.shares.sort();
        let missing = self.missing_shares();
        let is_open = |share: &Share| missing.iter().any(|m| m.of_text == share.of_text);
        self.shares.retain(is_open);
    }

    /// The first reason why the shares of the two do not add up.
    pub(super) fn check_shares(&self, other: &Self) -> Result<(), String> {
        for share in &other.shares {
            let same_text = self
                .shares
                .iter()
                .filter(|own| own.of_text == share.of_text);
            for own in same_text {
                if own == share {
                    return Err(format!("share {share} is in both files; leave one out"));
                }
                if own.parts != share.parts {
                    return Err(format!(
                        "shares {own} and {share} are of different splits of the same samples; calibrate with one split"
                    ));
                }
            }
        }
        Ok(())
    }
}
