//! Experts of given widths, as the CPU reads them and as the kernels do.

use half::bf16;
use rand_chacha::ChaCha8Rng;
use tenp_kernels::cpu::moe::ExpertWeights;
use tenp_kernels::device::PaddedLayout;
use tenp_kernels::{MatrixView, RaggedLayout};

use super::bf16_values;

/// One expert's matrices in bf16.
pub struct Expert {
    /// `[width, H]`.
    pub gate: Vec<bf16>,
    /// `[width, H]`.
    pub up: Vec<bf16>,
    /// `[H, width]`.
    pub down: Vec<bf16>,
}

/// A layer's experts.
pub struct Layer {
    pub hidden: usize,
    pub widths: Vec<usize>,
    pub experts: Vec<Expert>,
    pub layout: PaddedLayout,
}

impl Layer {
    /// Random weights of a size that keeps activations near 1.
    pub fn random(rng: &mut ChaCha8Rng, hidden: usize, widths: &[usize]) -> Self {
        let scale = (3.0 / hidden as f32).sqrt();
        let experts = widths
            .iter()
            .map(|&width| Expert {
                gate: bf16_values(rng, width * hidden, scale),
                up: bf16_values(rng, width * hidden, scale),
                down: bf16_values(rng, width * hidden, scale),
            })
            .collect();
        let ragged = RaggedLayout::new(widths.to_vec()).expect("small widths");
        Self {
            hidden,
            widths: widths.to_vec(),
            experts,
            layout: PaddedLayout::new(&ragged).expect("small widths"),
        }
    }

    pub fn num_experts(&self) -> usize {
        self.widths.len()
    }

    /// Width rounded up to whole fragments.
    pub fn width_padded(&self, expert: usize) -> usize {
        self.layout.range(expert).len()
    }

    /// Pitch of h.
    pub fn hidden_pitch(&self) -> usize {
        self.layout.hidden_pitch()
    }

    /// Neuron `neuron`'s column of an expert's down projection.
    pub fn down_column(&self, expert: usize, neuron: usize) -> Vec<bf16> {
        let column = self.experts[expert].down.iter().skip(neuron);
        column.step_by(self.widths[expert]).copied().collect()
    }

    /// `GU [2S, H]`.
    pub fn gate_up(&self) -> Vec<bf16> {
        let mut out = vec![bf16::NAN; 2 * self.layout.total() * self.hidden];
        self.layout
            .pack_gate_up(self.hidden, &self.views(), &mut out)
            .expect("the shapes are its own");
        out
    }

    /// `DT [S, H]`.
    pub fn down_t(&self) -> Vec<bf16> {
        let mut out = vec![bf16::NAN; self.layout.total() * self.hidden];
        self.layout
            .pack_down(self.hidden, &self.views(), &mut out)
            .expect("the shapes are its own");
        out
    }

    /// As the CPU kernels take them.
    pub fn views(&self) -> Vec<ExpertWeights<'_>> {
        let h = self.hidden;
        self.experts
            .iter()
            .zip(&self.widths)
            .map(|(expert, &width)| ExpertWeights {
                gate: MatrixView::from_bf16(width, h, &expert.gate).expect("the shape is its own"),
                up: MatrixView::from_bf16(width, h, &expert.up).expect("the shape is its own"),
                down: MatrixView::from_bf16(h, width, &expert.down).expect("the shape is its own"),
            })
            .collect()
    }
}
