//! Projection rescale (`docs/methods.md`, "Recovery"): the kept columns of a narrowed expert's down projection times a
//! factor.

use std::error::Error;
use std::fmt::Write as _;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tenp_checkpoint::{
    Checkpoint, LayerPlan, LayerRewriter, Notes, OutputDtype, RewrittenExpert, RewrittenLayer, Room,
};

use super::encode::encode;
use crate::ModelError;

/// Scales the down projections of narrowed experts.
pub struct Rescale<'c> {
    checkpoint: &'c Checkpoint,
    /// `[MoE layer][expert]`.
    factors: Vec<Vec<f64>>,
}

impl<'c> Rescale<'c> {
    /// Factors by MoE layer and expert; experts that are whole do not use theirs.
    pub fn new(checkpoint: &'c Checkpoint, factors: Vec<Vec<f64>>) -> Self {
        Self {
            checkpoint,
            factors,
        }
    }

    fn rewrite(
        &self,
        plan: &LayerPlan,
        dtype: OutputDtype,
        room: &Room,
    ) -> Result<RewrittenLayer, ModelError> {
        let layer = plan.layer;
        let index = self
            .checkpoint
            .config()
            .moe_index(layer)
            .unwrap_or_default();
        let mut new = RewrittenLayer::default();
        for expert in plan.kept() {
            let Some(kept) = &expert.neurons else {
                continue;
            };
            let factor = self.factors[index][expert.id];
            let down = self.checkpoint.expert(layer, expert.id)?.down;
            let values = down.to_f32();
            let scaled: Vec<f32> = values
                .chunks_exact(down.cols.max(1))
                .flat_map(|row| {
                    kept.iter()
                        .map(|&j| (factor * f64::from(row[j as usize])) as f32)
                })
                .collect();
            new.experts.push(RewrittenExpert {
                id: expert.id,
                down: Some(encode(
                    room,
                    (layer, expert.id),
                    dtype.of(down.dtype),
                    (down.rows, kept.len()),
                    &scaled,
                )?),
                ..RewrittenExpert::default()
            });
        }
        Ok(new)
    }
}

impl LayerRewriter for Rescale<'_> {
    fn settings(&self) -> String {
        let mut hash = Sha256::new();
        for factor in self.factors.iter().flatten() {
            hash.update(factor.to_le_bytes());
        }
        let mut text = "rescale 1 ".to_owned();
        for byte in hash.finalize() {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        text
    }

    fn layer(
        &mut self,
        layer: &LayerPlan,
        dtype: OutputDtype,
        room: &Room,
    ) -> Result<RewrittenLayer, Box<dyn Error + Send + Sync>> {
        Ok(self.rewrite(layer, dtype, room)?)
    }

    fn notes(&self, _outcomes: &[Value]) -> Notes {
        let mut report: Map<String, Value> = Map::new();
        report.insert(
            "recovery".to_owned(),
            json!({"method": "rescale", "factors": self.factors}),
        );
        let card = "\nThe down projections of narrowed experts were rescaled to the whole experts' contribution.\n";
        Notes {
            report,
            card: card.to_owned(),
        }
    }
}
