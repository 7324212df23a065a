//! Expert weights in device form (`docs/cuda.md`): neuron-major, every expert's width padded to [`NEURON_PAD`].
//!
//! `GU` is `[2S, H]` with gate and up rows interleaved in groups of [`INTERLEAVE`], `DT` is `[S, H]`, the down
//! projection transposed; S = Σ padded widths. Padding rows are zero, so they add nothing anywhere.

use half::bf16;
use rayon::prelude::*;

use super::check::{check_offsets, to_i32};
use crate::cpu::moe::ExpertWeights;
use crate::error::check_len;
use crate::{KernelError, MatrixView, RaggedLayout};

/// Padded widths are multiples of this: the inner step of the down product.
pub const NEURON_PAD: usize = 16;

/// Rows of gate, then as many rows of up: gate and up of one neuron meet in one thread's accumulators.
pub const INTERLEAVE: usize = 8;

/// Widths of the experts and their places in `GU` and `DT`, as the kernels read them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PaddedLayout {
    widths: Vec<i32>,
    neuron_offsets: Vec<i32>,
}

impl PaddedLayout {
    /// Places experts of these widths one after another.
    ///
    /// # Errors
    /// [`KernelError::Invalid`] if the padded widths add up past 2³¹ − 1.
    pub fn new(layout: &RaggedLayout) -> Result<Self, KernelError> {
        let mut total = 0usize;
        let mut neuron_offsets = vec![0];
        let mut widths = Vec::with_capacity(layout.num_experts());
        for &width in layout.widths() {
            widths.push(to_i32("expert width", width)?);
            total = total.saturating_add(width.next_multiple_of(NEURON_PAD));
            neuron_offsets.push(to_i32("padded neurons", total)?);
        }
        // 2S rows are counted in i32 too.
        to_i32("rows of GU", total.saturating_mul(2))?;
        Ok(Self {
            widths,
            neuron_offsets,
        })
    }

    /// Takes tables made elsewhere.
    ///
    /// # Errors
    /// [`KernelError::Length`], [`KernelError::NotMonotonic`], [`KernelError::Invalid`] for offsets that are no
    /// multiples of [`NEURON_PAD`] or do not begin at 0, [`KernelError::TooWide`] for a width over the room between two offsets.
    pub fn from_tables(widths: Vec<i32>, neuron_offsets: Vec<i32>) -> Result<Self, KernelError> {
        check_len("neuron offsets", widths.len() + 1, neuron_offsets.len())?;
        check_offsets("neuron offsets", &neuron_offsets)?;
        let pad = NEURON_PAD as i32;
        if neuron_offsets[0] != 0 || neuron_offsets.iter().any(|o| o % pad != 0) {
            return Err(KernelError::Invalid {
                what: "neuron offsets",
                why: format!("they must begin at 0 and be multiples of {NEURON_PAD}"),
            });
        }
        for (expert, &width) in widths.iter().enumerate() {
            let padded = neuron_offsets[expert + 1] - neuron_offsets[expert];
            if width < 0 || width > padded {
                return Err(KernelError::TooWide {
                    what: "widths",
                    expert,
                    width: i64::from(width),
                    padded: i64::from(padded),
                });
            }
        }
        Ok(Self {
            widths,
            neuron_offsets,
        })
    }

    /// Number of experts.
    #[must_use]
    pub fn num_experts(&self) -> usize {
        self.widths.len()
    }

    /// `[E]` real widths.
    #[must_use]
    pub fn widths(&self) -> &[i32] {
        &self.widths
    }

    /// `[E + 1]` first padded neuron of every expert, and S.
    #[must_use]
    pub fn neuron_offsets(&self) -> &[i32] {
        &self.neuron_offsets
    }

    /// Padded neurons of `expert`.
    #[must_use]
    pub fn range(&self, expert: usize) -> std::ops::Range<usize> {
        self.neuron_offsets[expert] as usize..self.neuron_offsets[expert + 1] as usize
    }

    /// Padded neurons in all, S.
    #[must_use]
    pub fn total(&self) -> usize {
        self.neuron_offsets[self.widths.len()] as usize
    }

    /// The widest expert's padded width: the pitch of h.
    #[must_use]
    pub fn hidden_pitch(&self) -> usize {
        let widest = (0..self.num_experts()).map(|e| self.range(e).len()).max();
        widest.unwrap_or(0).max(NEURON_PAD)
    }

    /// Copies a table over padded neurons to one over real neurons.
    ///
    /// # Errors
    /// [`KernelError::Length`] if `padded` is not `[S]`.
    pub fn unpad(&self, padded: &[f64]) -> Result<Vec<f64>, KernelError> {
        check_len("padded neuron table", self.total(), padded.len())?;
        let mut out = Vec::new();
        for (expert, &width) in self.widths.iter().enumerate() {
            let start = self.range(expert).start;
            out.extend_from_slice(&padded[start..start + width as usize]);
        }
        Ok(out)
    }

    fn check(
        &self,
        hidden: usize,
        experts: &[ExpertWeights<'_>],
        out: (&'static str, usize, usize),
    ) -> Result<(), KernelError> {
        check_len("experts", self.num_experts(), experts.len())?;
        for (expert, &width) in experts.iter().zip(&self.widths) {
            check_len("expert width", width as usize, expert.width())?;
            for (what, matrix, shape) in [
                ("expert gate weight", &expert.gate, (expert.width(), hidden)),
                ("expert up weight", &expert.up, (expert.width(), hidden)),
                ("expert down weight", &expert.down, (hidden, expert.width())),
            ] {
                let got = (matrix.rows(), matrix.cols());
                if got != shape {
                    return Err(KernelError::Shape {
                        what,
                        expected: shape,
                        got,
                    });
                }
            }
        }
        check_len(out.0, out.1, out.2)
    }

    /// Writes `GU`, `[2S, H]`.
    ///
    /// # Errors
    /// Shapes and lengths that do not fit together.
    pub fn pack_gate_up(
        &self,
        hidden: usize,
        experts: &[ExpertWeights<'_>],
        out: &mut [bf16],
    ) -> Result<(), KernelError> {
        self.check(
            hidden,
            experts,
            ("packed gate and up", 2 * self.total() * hidden, out.len()),
        )?;
        let group = 2 * INTERLEAVE * hidden;
        if group == 0 {
            return Ok(());
        }
        let expert_of_group = self.expert_of(INTERLEAVE);
        out.par_chunks_exact_mut(group)
            .zip(expert_of_group.par_iter())
            .enumerate()
            .for_each(|(g, (out, &e))| {
                let first = g * INTERLEAVE - self.range(e).start;
                for (i, row) in out.chunks_exact_mut(hidden).enumerate() {
                    let matrix = if i < INTERLEAVE {
                        &experts[e].gate
                    } else {
                        &experts[e].up
                    };
                    copy_row(matrix, first + i % INTERLEAVE, row);
                }
            });
        Ok(())
    }

    /// Writes `DT`, `[S, H]`.
    ///
    /// # Errors
    /// Shapes and lengths that do not fit together.
    pub fn pack_down(
        &self,
        hidden: usize,
        experts: &[ExpertWeights<'_>],
        out: &mut [bf16],
    ) -> Result<(), KernelError> {
        self.check(
            hidden,
            experts,
            ("packed down", self.total() * hidden, out.len()),
        )?;
        let group = NEURON_PAD * hidden;
        if group == 0 {
            return Ok(());
        }
        let expert_of_group = self.expert_of(NEURON_PAD);
        out.par_chunks_exact_mut(group)
            .zip(expert_of_group.par_iter())
            .enumerate()
            .for_each(|(g, (out, &e))| {
                let first = g * NEURON_PAD - self.range(e).start;
                transpose_columns(&experts[e].down, first, hidden, out);
            });
        Ok(())
    }

    /// The expert that each run of `step` padded neurons belongs to; `step` divides [`NEURON_PAD`].
    fn expert_of(&self, step: usize) -> Vec<usize> {
        (0..self.num_experts())
            .flat_map(|e| std::iter::repeat_n(e, self.range(e).len() / step))
            .collect()
    }
}

/// Row `row` in bf16; zeros past the last.
fn copy_row(matrix: &MatrixView<'_>, row: usize, out: &mut [bf16]) {
    if row >= matrix.rows() {
        out.fill(bf16::ZERO);
        return;
    }
    matrix
        .round_row(row, out)
        .expect("the row is there, and shapes were checked");
}

/// Columns `first..first + NEURON_PAD` of `[H, width]` become rows; zeros past the last column.
///
/// Sixteen columns of a row are one cache line or less, and 64 rows of them stay in the first cache level while they
/// are written out as sixteen runs of 64.
fn transpose_columns(down: &MatrixView<'_>, first: usize, hidden: usize, out: &mut [bf16]) {
    const ROWS: usize = 64;
    let count = down.cols().saturating_sub(first).min(NEURON_PAD);
    let mut block = [[bf16::ZERO; NEURON_PAD]; ROWS];
    for start in (0..hidden).step_by(ROWS) {
        let rows = (hidden - start).min(ROWS);
        for (r, line) in block[..rows].iter_mut().enumerate() {
            down.row(start + r)
                .round(first.min(down.cols()), &mut line[..count]);
        }
        for (c, row) in out.chunks_exact_mut(hidden).enumerate() {
            for (to, line) in row[start..start + rows].iter_mut().zip(&block) {
                *to = if c < count { line[c] } else { bf16::ZERO };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(seed: usize, row: usize, col: usize) -> f32 {
        ((seed * 7919 + row * 131 + col * 17) % 251) as f32 / 64.0 - 2.0
    }

    struct Expert {
        width: usize,
        gate: Vec<f32>,
        up: Vec<f32>,
        down: Vec<f32>,
    }

    fn expert(seed: usize, width: usize, hidden: usize) -> Expert {
        let make = |s: usize, rows: usize, cols: usize| -> Vec<f32> {
            (0..rows * cols)
                .map(|i| value(s, i / cols, i % cols))
                .collect()
        };
        Expert {
            width,
            gate: make(3 * seed, width, hidden),
            up: make(3 * seed + 1, width, hidden),
            down: make(3 * seed + 2, hidden, width.max(1))[..hidden * width].to_vec(),
        }
    }

    fn packed(widths: &[usize], hidden: usize, as_bf16: bool) {
        let layout = PaddedLayout::new(&RaggedLayout::new(widths.to_vec()).unwrap()).unwrap();
        let experts: Vec<Expert> = widths
            .iter()
            .enumerate()
            .map(|(e, &w)| expert(e, w, hidden))
            .collect();
        let rounded: Vec<[Vec<bf16>; 3]> = experts
            .iter()
            .map(|e| {
                [&e.gate, &e.up, &e.down].map(|v| v.iter().map(|&x| bf16::from_f32(x)).collect())
            })
            .collect();
        let views: Vec<ExpertWeights<'_>> = experts
            .iter()
            .zip(&rounded)
            .map(|(e, r)| {
                let view = |i: usize, rows, cols| {
                    if as_bf16 {
                        MatrixView::from_bf16(rows, cols, &r[i]).unwrap()
                    } else {
                        MatrixView::from_f32(rows, cols, [&e.gate, &e.up, &e.down][i]).unwrap()
                    }
                };
                ExpertWeights {
                    gate: view(0, e.width, hidden),
                    up: view(1, e.width, hidden),
                    down: view(2, hidden, e.width),
                }
            })
            .collect();
        let mut gu = vec![bf16::NAN; 2 * layout.total() * hidden];
        let mut dt = vec![bf16::NAN; layout.total() * hidden];
        layout.pack_gate_up(hidden, &views, &mut gu).unwrap();
        layout.pack_down(hidden, &views, &mut dt).unwrap();
        for (e, r) in rounded.iter().enumerate() {
            let range = layout.range(e);
            assert_eq!(range.len() % NEURON_PAD, 0);
            for (j, neuron) in range.clone().enumerate() {
                // Definition of GU: in groups of 16 rows, 8 gate rows and then the 8 up rows of the same neurons.
                let gate_row = 16 * (neuron / 8) + neuron % 8;
                for c in 0..hidden {
                    let want =
                        |v: &[bf16], at: usize| if j < widths[e] { v[at] } else { bf16::ZERO };
                    assert_eq!(gu[gate_row * hidden + c], want(&r[0], j * hidden + c));
                    assert_eq!(gu[(gate_row + 8) * hidden + c], want(&r[1], j * hidden + c));
                    assert_eq!(dt[neuron * hidden + c], want(&r[2], c * widths[e] + j));
                }
            }
        }
        dt.push(bf16::ZERO);
        assert!(layout.pack_down(hidden, &views, &mut dt).is_err());
        let fits = layout.pack_gate_up(hidden + 1, &views, &mut gu);
        assert_eq!(fits.is_ok(), widths.is_empty());
    }

    #[test]
    fn packing_follows_the_definition() {
        for hidden in [1, 8, 33, 64, 70, 136] {
            packed(&[0, 1, 7, 8, 15, 16, 17, 63, 64, 65, 129], hidden, true);
        }
        packed(&[5, 40], 65, false);
        packed(&[0, 0], 16, true);
        packed(&[], 16, true);
    }

    #[test]
    fn tables_are_checked() {
        let good = PaddedLayout::from_tables(vec![5, 0, 16], vec![0, 16, 16, 48]).unwrap();
        assert_eq!((good.total(), good.hidden_pitch()), (48, 32));
        let table: Vec<f64> = (0..48).map(f64::from).collect();
        assert_eq!(
            good.unpad(&table).unwrap()[..7],
            [0., 1., 2., 3., 4., 16., 17.]
        );
        assert!(good.unpad(&table[1..]).is_err());
        for (widths, offsets) in [
            (vec![5], vec![0]),
            (vec![5, 5], vec![0, 16, 0]),
            (vec![5], vec![16, 32]),
            (vec![5], vec![0, 20]),
            (vec![-1], vec![0, 16]),
        ] {
            assert!(PaddedLayout::from_tables(widths, offsets).is_err());
        }
        assert!(matches!(
            PaddedLayout::from_tables(vec![3, 17], vec![0, 16, 32]),
            Err(KernelError::TooWide {
                expert: 1,
                width: 17,
                padded: 16,
                ..
            })
        ));
        let huge = RaggedLayout::new(vec![1 << 30, 1 << 30]).unwrap();
        assert!(PaddedLayout::new(&huge).is_err());
    }
}
