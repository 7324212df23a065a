//! The kept widths over layers and experts, as text.

use std::fmt::Write as _;

use tenp_checkpoint::Plan;

const SHADES: [char; 9] = ['·', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// One row per MoE layer, one column per expert (several experts share a column where they do not fit in `columns`).
pub(crate) fn widths(plan: &Plan, expert_width: usize, columns: usize) -> String {
    let num_experts = plan.layers.first().map_or(0, |l| l.experts.len());
    let room = columns.saturating_sub(24).max(16);
    let per_column = num_experts.div_ceil(room).max(1);
    let mut text = format!(
        "kept width, {num_experts} experts of {expert_width} neurons across{}, MoE layers down\n",
        if per_column > 1 {
            format!(" ({per_column} a column)")
        } else {
            String::new()
        }
    );
    for layer in &plan.layers {
        let kept: usize = layer.experts.iter().map(|e| e.width).sum();
        let whole = layer
            .experts
            .iter()
            .filter(|e| e.width == expert_width)
            .count();
        let share = kept as f64 / (num_experts * expert_width).max(1) as f64;
        let cells: String = layer
            .experts
            .chunks(per_column)
            .map(|experts| {
                let mean =
                    experts.iter().map(|e| e.width).sum::<usize>() as f64 / experts.len() as f64;
                let share = mean / expert_width.max(1) as f64;
                // The full block is kept for whole experts.
                let shade = if share >= 1.0 {
                    8
                } else {
                    (share * 8.0).round().min(7.0) as usize
                };
                SHADES[if share > 0.0 { shade.max(1) } else { 0 }]
            })
            .collect();
        let (layer, percent) = (layer.layer, share * 100.0);
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{layer:>4} {cells} {percent:>4.0} %  {whole} whole");
    }
    text.push_str("     █ whole   ▁–▇ narrower   · none\n");
    text
}
