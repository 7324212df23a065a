//! How many calibration tokens each expert saw.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tenp_checkpoint::Statistics;

use crate::console;

/// Experts listed on one line.
const SHOWN: usize = 20;

/// Tokens of every expert over all domains, by layer.
pub(crate) struct Coverage(BTreeMap<usize, Vec<i64>>);

impl Coverage {
    pub(crate) fn of(statistics: &Statistics) -> Self {
        let mut all: BTreeMap<usize, Vec<i64>> = BTreeMap::new();
        for (layer, table) in statistics.domains.values().flatten() {
            let sums = all
                .entry(*layer)
                .or_insert_with(|| vec![0; table.num_experts]);
            for (sum, tokens) in sums.iter_mut().zip(&table.tokens) {
                *sum = sum.saturating_add(*tokens);
            }
        }
        Self(all)
    }

    /// Layer, expert and tokens of the experts that saw fewer than `min_tokens`.
    pub(crate) fn below(&self, min_tokens: u32) -> Vec<(usize, usize, i64)> {
        let experts = self.0.iter().flat_map(|(layer, tokens)| {
            let experts = tokens.iter().enumerate();
            experts.map(move |(expert, tokens)| (*layer, expert, *tokens))
        });
        experts
            .filter(|(_, _, tokens)| *tokens < i64::from(min_tokens))
            .collect()
    }

    /// Warns of experts whose scores rest on few tokens.
    pub(crate) fn warn(&self, min_tokens: u32) {
        let few = self.below(min_tokens);
        if few.is_empty() {
            return;
        }
        let shown: Vec<String> = few
            .iter()
            .take(SHOWN)
            .map(|(layer, expert, tokens)| format!("{layer}/{expert} ({tokens})"))
            .collect();
        let more = if few.len() > SHOWN { ", …" } else { "" };
        console::note(&format!(
            "{} experts saw fewer than {min_tokens} calibration tokens, layer/expert (tokens): {}{more}; more or other \
             calibration text would reach them, --min-tokens sets the limit",
            few.len(),
            shown.join(", ")
        ));
    }

    /// For `report.json`.
    pub(crate) fn json(&self, min_tokens: u32) -> Value {
        json!({
            "min_tokens": min_tokens,
            "below": self.below(min_tokens),
            "tokens": self.0.values().collect::<Vec<_>>(),
        })
    }
}
