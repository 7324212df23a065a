//! Which tokens only serve to choose the ridge.

use crate::Sequences;

/// One sample in this many is held out, or this share of each where there are fewer samples.
const HELD_OUT: usize = 5;

/// By token: whether it is held out to choose the ridge by. Every fifth sample of a domain is, or the last fifth of each
/// sample where the domain has fewer than five.
pub(super) fn held_out(sequences: &Sequences) -> Vec<bool> {
    let spans = sequences.spans();
    let mut held = vec![false; sequences.num_tokens()];
    let domains = spans
        .iter()
        .map(|span| span.label)
        .max()
        .map_or(0, |l| l + 1);
    for domain in 0..domains {
        let own: Vec<_> = spans.iter().filter(|span| span.label == domain).collect();
        for (index, span) in own.iter().enumerate() {
            let rows = span.rows.clone();
            let from = if own.len() < HELD_OUT {
                rows.end - rows.len() / HELD_OUT
            } else if index % HELD_OUT == HELD_OUT - 1 {
                rows.start
            } else {
                rows.end
            };
            held[from..rows.end].fill(true);
        }
    }
    held
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifth_is_held_out() {
        let mut few = Sequences::default();
        few.push(&[1; 10], 0);
        few.push(&[1; 4], 0);
        let held = held_out(&few);
        assert_eq!(held.iter().filter(|h| **h).count(), 2);
        assert!(held[8] && held[9]);
        let mut many = Sequences::default();
        for label in [0, 0, 0, 0, 0, 0, 1] {
            many.push(&[1; 5], label);
        }
        let held = held_out(&many);
        assert!(
            held[20..25].iter().all(|h| *h),
            "the fifth sample of the first domain"
        );
        assert!(held[34], "the last token of the only sample of the second");
        assert_eq!(held.iter().filter(|h| **h).count(), 6);
    }
}
