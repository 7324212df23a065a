//! Batches of token sequences, without padding.

use std::ops::Range;

use tenp_checkpoint::ModelConfig;

use crate::ModelError;

/// One sequence of a batch: its rows, and where its tokens stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Position of the first token.
    pub first_position: usize,
    /// Index of the sequence that this one continues; its keys and values come first.
    pub parent: Option<usize>,
    /// Group of the sequence (a calibration domain); blocks of work never mix groups.
    pub label: usize,
}

/// Token sequences one after another; a sequence may branch off an earlier one, whose tokens are then computed once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequences {
    ids: Vec<u32>,
    spans: Vec<Span>,
}

impl Sequences {
    /// Appends a sequence and returns its index.
    pub fn push(&mut self, ids: &[u32], label: usize) -> usize {
        self.add(ids, 0, None, label)
    }

    /// Appends a continuation of the sequence `parent`, which must be the last one pushed without a parent.
    ///
    /// # Panics
    /// If `parent` is not that sequence: a branch is only computed together with its stem.
    pub fn push_branch(&mut self, ids: &[u32], parent: usize) -> usize {
        let stem = self.spans.iter().rposition(|s| s.parent.is_none());
        assert_eq!(stem, Some(parent), "branches follow their stem");
        let span = &self.spans[parent];
        let (position, label) = (span.first_position + span.rows.len(), span.label);
        self.add(ids, position, Some(parent), label)
    }

    /// Appends tokens that continue a cached sequence at `first_position`.
    pub fn push_at(&mut self, ids: &[u32], first_position: usize) -> usize {
        self.add(ids, first_position, None, 0)
    }

    fn add(
        &mut self,
        ids: &[u32],
        first_position: usize,
        parent: Option<usize>,
        label: usize,
    ) -> usize {
        let start = self.ids.len();
        self.ids.extend_from_slice(ids);
        self.spans.push(Span {
            rows: start..self.ids.len(),
            first_position,
            parent,
            label,
        });
        self.spans.len() - 1
    }

    /// Token ids of all rows.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The sequences.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Number of rows.
    pub fn num_tokens(&self) -> usize {
        self.ids.len()
    }

    /// Position of every row in its sequence.
    pub(crate) fn positions(&self) -> Vec<u32> {
        self.spans
            .iter()
            .flat_map(|s| (s.first_position..s.first_position + s.rows.len()).map(|p| p as u32))
            .collect()
    }

    /// One past the largest position.
    pub(crate) fn max_positions(&self) -> usize {
        self.spans
            .iter()
            .map(|s| s.first_position + s.rows.len())
            .max()
            .unwrap_or(0)
    }

    /// Every id is in the vocabulary and every position in the model.
    ///
    /// # Errors
    /// Names the sample, counted from 0.
    pub fn check(&self, config: &ModelConfig) -> Result<(), ModelError> {
        for (index, span) in self.spans.iter().enumerate() {
            let place = || format!("sample {index}");
            if let Some(&id) = self.ids[span.rows.clone()]
                .iter()
                .find(|&&id| id as usize >= config.vocab_size)
            {
                return Err(ModelError::TokenId {
                    place: place(),
                    id,
                    vocab_size: config.vocab_size,
                });
            }
            let len = span.first_position + span.rows.len();
            if len > config.max_positions {
                return Err(ModelError::TooLong {
                    place: place(),
                    len,
                    max: config.max_positions,
                });
            }
        }
        Ok(())
    }

    /// Splits the sequences into blocks of about `max_tokens` rows of one label each, never between a stem and its
    /// branches.
    pub(crate) fn blocks(&self, max_tokens: usize) -> Vec<Range<usize>> {
        let mut blocks: Vec<Range<usize>> = Vec::new();
        let mut start = 0;
        while start < self.spans.len() {
            let mut end = start;
            loop {
                // One more family: a stem and the branches behind it.
                let mut next = end + 1;
                while next < self.spans.len() && self.spans[next].parent.is_some() {
                    next += 1;
                }
                let tokens = self.spans[next - 1].rows.end - self.spans[start].rows.start;
                if end > start && tokens > max_tokens {
                    break;
                }
                end = next;
                if end == self.spans.len() || self.spans[end].label != self.spans[start].label {
                    break;
                }
            }
            blocks.push(start..end);
            start = end;
        }
        blocks
    }

    /// Rows of a block of sequences.
    pub(crate) fn rows(&self, block: &Range<usize>) -> Range<usize> {
        self.spans[block.start].rows.start..self.spans[block.end - 1].rows.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_keep_families_and_labels_together() {
        let mut s = Sequences::default();
        let stem = s.push(&[1; 10], 0);
        s.push_branch(&[2; 3], stem);
        s.push_branch(&[2; 3], stem);
        s.push(&[1; 4], 0);
        s.push(&[1; 4], 1);
        s.push(&[1; 50], 1);
        assert_eq!(s.blocks(20), [0..4, 4..5, 5..6]);
        assert_eq!(s.blocks(5), [0..3, 3..4, 4..5, 5..6]);
        assert_eq!(s.rows(&(0..3)), 0..16);
        assert_eq!(&s.positions()[8..14], [8, 9, 10, 11, 12, 10]);
    }
}
