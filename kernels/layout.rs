//! Who owns which rows: neurons of ragged experts, and the tokens routed to them.

use crate::KernelError;
use crate::error::check_len;

/// Widths of the experts of a layer and the prefix sums over them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaggedLayout {
    widths: Vec<usize>,
    offsets: Vec<usize>,
}

impl RaggedLayout {
    /// Layout of experts with these widths, one after another.
    ///
    /// # Errors
    /// [`KernelError::Invalid`] if the widths add up past the address space.
    pub fn new(widths: Vec<usize>) -> Result<Self, KernelError> {
        let mut offsets = Vec::with_capacity(widths.len() + 1);
        let mut total = 0usize;
        offsets.push(0);
        for &width in &widths {
            total = total
                .checked_add(width)
                .ok_or_else(|| KernelError::Invalid {
                    what: "widths",
                    why: "their sum does not fit in memory".into(),
                })?;
            offsets.push(total);
        }
        Ok(Self { widths, offsets })
    }

    /// Number of experts.
    #[must_use]
    pub fn num_experts(&self) -> usize {
        self.widths.len()
    }

    /// Width of every expert.
    #[must_use]
    pub fn widths(&self) -> &[usize] {
        &self.widths
    }

    /// Neurons of `expert` in a table over all experts' neurons.
    #[must_use]
    pub fn range(&self, expert: usize) -> std::ops::Range<usize> {
        self.offsets[expert]..self.offsets[expert + 1]
    }

    /// Neurons in all.
    #[must_use]
    pub fn total(&self) -> usize {
        self.offsets[self.widths.len()]
    }
}

/// The rows of a layer's routed work, grouped by expert: row = one (token, chosen expert) pair.
///
/// Rows of an expert are in token order, so any sum over an expert's rows has a fixed order.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertGroups {
    num_tokens: usize,
    top_k: usize,
    offsets: Vec<usize>,
    token_ids: Vec<u32>,
    weights: Vec<f32>,
    rows_of_token: Vec<u32>,
}

impl ExpertGroups {
    /// Groups `expert_ids` and `weights`, both `[num_tokens, top_k]`, by expert.
    ///
    /// # Errors
    /// [`KernelError::Length`] for lengths that are no multiple of `top_k` or differ, [`KernelError::Index`] for an
    /// expert id ≥ `num_experts`.
    pub fn new(
        num_experts: usize,
        top_k: usize,
        expert_ids: &[u32],
        weights: &[f32],
    ) -> Result<Self, KernelError> {
        if top_k == 0 {
            return Err(KernelError::Invalid {
                what: "top_k",
                why: "must be at least 1".into(),
            });
        }
        let num_tokens = expert_ids.len() / top_k;
        check_len("expert ids", num_tokens * top_k, expert_ids.len())?;
        check_len("routing weights", expert_ids.len(), weights.len())?;
        let mut offsets = vec![0usize; num_experts + 1];
        for &expert in expert_ids {
            let expert = expert as usize;
            if expert >= num_experts {
                return Err(KernelError::Index {
                    what: "expert id",
                    index: expert,
                    len: num_experts,
                });
            }
            offsets[expert + 1] += 1;
        }
        for e in 0..num_experts {
            offsets[e + 1] += offsets[e];
        }
        let mut next = offsets.clone();
        let mut token_ids = vec![0u32; expert_ids.len()];
        let mut row_weights = vec![0f32; expert_ids.len()];
        let mut rows_of_token = vec![0u32; expert_ids.len()];
        for (slot, (&expert, &weight)) in expert_ids.iter().zip(weights).enumerate() {
            let row = next[expert as usize];
            next[expert as usize] += 1;
            token_ids[row] = (slot / top_k) as u32;
            row_weights[row] = weight;
            rows_of_token[slot] = row as u32;
        }
        Ok(Self {
            num_tokens,
            top_k,
            offsets,
            token_ids,
            weights: row_weights,
            rows_of_token,
        })
    }

    /// One expert that every token goes to with weight 1 (a dense or a shared MLP).
    #[must_use]
    pub fn dense(num_tokens: usize) -> Self {
        let ids: Vec<u32> = (0..num_tokens as u32).collect();
        Self {
            num_tokens,
            top_k: 1,
            offsets: vec![0, num_tokens],
            token_ids: ids.clone(),
            weights: vec![1.0; num_tokens],
            rows_of_token: ids,
        }
    }

    /// Number of experts.
    #[must_use]
    pub fn num_experts(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of tokens.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Number of rows, `num_tokens · top_k`.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.token_ids.len()
    }

    /// Rows of `expert`.
    #[must_use]
    pub fn rows(&self, expert: usize) -> std::ops::Range<usize> {
        self.offsets[expert]..self.offsets[expert + 1]
    }

    /// `[rows]` token of each row.
    #[must_use]
    pub fn token_ids(&self) -> &[u32] {
        &self.token_ids
    }

    /// `[rows]` weight g that multiplies the row's output.
    #[must_use]
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The rows of `token`, in the order its experts were chosen.
    #[must_use]
    pub fn rows_of_token(&self, token: usize) -> &[u32] {
        &self.rows_of_token[token * self.top_k..(token + 1) * self.top_k]
    }
}
