//! Experts of given widths, as the CPU reads them and as the kernels do.

use half::bf16;
use rand_chacha::ChaCha8Rng;
use tenp_kernels::MatrixView;
use tenp_kernels::cpu::moe::ExpertWeights;

use super::{bf16_values, bits};

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
        Self {
            hidden,
            widths: widths.to_vec(),
            experts,
        }
    }

    pub fn num_experts(&self) -> usize {
        self.widths.len()
    }

    /// Width rounded up to whole fragments.
    pub fn width_padded(&self, expert: usize) -> usize {
        self.widths[expert].next_multiple_of(16)
    }

    /// `[E + 1]` in padded neurons.
    pub fn neuron_offsets(&self) -> Vec<i32> {
        let mut offsets = vec![0];
        for e in 0..self.num_experts() {
            offsets.push(offsets[e] + self.width_padded(e) as i32);
        }
        offsets
    }

    /// Padded neurons S.
    pub fn num_neurons(&self) -> usize {
        (0..self.num_experts()).map(|e| self.width_padded(e)).sum()
    }

    /// A pitch for h.
    pub fn hidden_pitch(&self) -> usize {
        (0..self.num_experts())
            .map(|e| self.width_padded(e))
            .max()
            .unwrap_or(0)
            .max(16)
    }

    /// `[E]`.
    pub fn device_widths(&self) -> Vec<i32> {
        self.widths.iter().map(|&w| w as i32).collect()
    }

    /// `GU [2S, H]`.
    pub fn gate_up(&self) -> Vec<u16> {
        let h = self.hidden;
        let mut out = vec![0u16; 2 * self.num_neurons() * h];
        for (e, offset) in self.neuron_offsets()[..self.num_experts()]
            .iter()
            .enumerate()
        {
            for j in 0..self.widths[e] {
                let row = 2 * (*offset as usize) + j / 8 * 16 + j % 8;
                let from = j * h..(j + 1) * h;
                out[row * h..(row + 1) * h]
                    .copy_from_slice(&bits(&self.experts[e].gate[from.clone()]));
                out[(row + 8) * h..(row + 9) * h].copy_from_slice(&bits(&self.experts[e].up[from]));
            }
        }
        out
    }

    /// `DT [S, H]`.
    pub fn down_t(&self) -> Vec<u16> {
        let h = self.hidden;
        let mut out = vec![0u16; self.num_neurons() * h];
        for (e, offset) in self.neuron_offsets()[..self.num_experts()]
            .iter()
            .enumerate()
        {
            let width = self.widths[e];
            for j in 0..width {
                for i in 0..h {
                    out[(*offset as usize + j) * h + i] =
                        self.experts[e].down[i * width + j].to_bits();
                }
            }
        }
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
