//! Adding statistics of several runs, shards or domains.

use super::fields::{FIELDS, Field, Merge};
use super::{LayerStatistics, Statistics};
use crate::CheckpointError;

/// Weight norms of the same weights may differ by the order of an f64 sum, not by more.
const NORM_TOLERANCE: f64 = 1e-9;

impl Statistics {
    /// Adds another file's statistics. Sums add, `peak` and `output_peak` merge by maximum, weight norms must agree.
    /// Apart from the rounding of f64 additions the result does not depend on the order of merges.
    ///
    /// On error `self` is unchanged.
    ///
    /// # Errors
    /// Different checkpoints; the same share or the same calibration text in one domain of both; different layers or shapes in a domain of
    /// both; weight norms that differ.
    pub fn merge(&mut self, other: Self) -> Result<(), CheckpointError> {
        if *self == Self::default() {
            *self = other;
            return Ok(());
        }
        self.check(&other)?;
        self.run.clear();
        self.add_shares(other.shares);
        for (domain, layers) in other.domains {
            let own = self.domains.entry(domain).or_default();
            for (index, layer) in layers {
                match own.entry(index) {
                    std::collections::btree_map::Entry::Vacant(vacant) => {
                        vacant.insert(layer);
                    }
                    std::collections::btree_map::Entry::Occupied(mut occupied) => {
                        occupied.get_mut().add(&layer);
                    }
                }
            }
        }
        for (domain, fingerprints) in other.tokens {
            let own = self.tokens.entry(domain).or_default();
            own.extend(fingerprints);
            own.sort();
        }
        self.compute.extend(other.compute);
        self.compute.sort();
        self.compute.dedup();
        if other.version > self.version {
            self.version = other.version;
        }
        Ok(())
    }

    fn check(&self, other: &Self) -> Result<(), CheckpointError> {
        if self.checkpoint != other.checkpoint {
            return Err(error(
                "statistics",
                format!(
                    "of checkpoint {} cannot be merged with those of {}; calibrate the same checkpoint",
                    self.checkpoint, other.checkpoint
                ),
            ));
        }
        self.check_shares(other)
            .map_err(|problem| error("statistics", problem))?;
        // Two shares may hold the same sample twice, as their text does.
        let texts = (!self.shares_text_with(other)).then_some(&other.tokens);
        for (domain, fingerprints) in texts.into_iter().flatten() {
            let own = self.tokens.get(domain).map_or(&[][..], Vec::as_slice);
            if let Some(twice) = fingerprints.iter().find(|print| own.contains(print)) {
                return Err(error(
                    format!("domain {domain}"),
                    format!(
                        "the same calibration text is in both files (token fingerprint {twice}); leave one out"
                    ),
                ));
            }
        }
        for (domain, layers) in &other.domains {
            if let Some(own) = self.domains.get(domain)
                && !own.keys().eq(layers.keys())
            {
                return Err(error(
                    format!("domain {domain}"),
                    "the files hold different layers; calibrate whole models",
                ));
            }
            for (index, layer) in layers {
                for own in self.domains.values().filter_map(|own| own.get(index)) {
                    compatible(own, layer).map_err(|problem| {
                        error(format!("domain {domain}, layer {index}"), problem)
                    })?;
                }
            }
        }
        Ok(())
    }
}

fn compatible(own: &LayerStatistics, other: &LayerStatistics) -> Result<(), String> {
    if (own.num_experts, own.width) != (other.num_experts, other.width) {
        return Err(format!(
            "{} experts of width {} in one file, {} of width {} in the other",
            own.num_experts, own.width, other.num_experts, other.width
        ));
    }
    if own.tokens.len() != other.tokens.len() {
        return Err("tokens: lengths differ".to_owned());
    }
    for Field {
        name, merge, get, ..
    } in FIELDS
    {
        let (left, right) = (get(own), get(other));
        if left.len() != right.len() {
            return Err(format!("{name}: lengths differ"));
        }
        let too_large = |(a, b): (&f64, &f64)| !(a + b).is_finite();
        if *merge == Merge::Sum && left.iter().zip(right).any(too_large) {
            return Err(format!(
                "the sums of {name} are too large for a number; check the weights, and calibrate again"
            ));
        }
        let differs = |(a, b): (&f64, &f64)| (a - b).abs() > NORM_TOLERANCE * a.abs().max(b.abs());
        if *merge == Merge::Equal && left.iter().zip(right).any(differs) {
            return Err(format!(
                "{name} differs, so the weights did; calibrate the same checkpoint"
            ));
        }
    }
    Ok(())
}

impl LayerStatistics {
    /// Adds the same layer's statistics over other tokens. Tables that are empty in `other` stay as they are.
    pub fn add(&mut self, other: &Self) {
        for (own, count) in self.tokens.iter_mut().zip(&other.tokens) {
            *own = own.saturating_add(*count);
        }
        self.total_tokens = self.total_tokens.saturating_add(other.total_tokens);
        for field in FIELDS {
            let values = (field.get)(other);
            for (own, value) in (field.get_mut)(self).iter_mut().zip(values) {
                *own = match field.merge {
                    Merge::Sum => *own + value,
                    // Equal norms may differ in the last bits: the maximum does not depend on the order.
                    Merge::Max | Merge::Equal => own.max(*value),
                };
            }
        }
    }
}

fn error(place: impl Into<String>, problem: impl Into<String>) -> CheckpointError {
    CheckpointError::Statistics {
        place: place.into(),
        problem: problem.into(),
    }
}
