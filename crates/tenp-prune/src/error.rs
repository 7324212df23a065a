//! What can be wrong with a request, a checkpoint's shape or its statistics.

/// Why no plan could be made.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PruneError {
    /// A method or score with a name we do not know.
    #[error("unknown {what} `{got}`; expected one of: {expected}")]
    UnknownName {
        /// Kind of name.
        what: &'static str,
        /// The name given.
        got: String,
        /// The names there are, comma-separated.
        expected: String,
    },
    /// `--keep` outside (0, 1], or not a number.
    #[error("--keep {got}: expected a share above 0 and at most 1, such as 0.6")]
    Keep {
        /// The value given.
        got: f64,
    },
    /// `--alpha` outside [0, keep], or not a number.
    #[error(
        "--alpha {got}: expected a share from 0 to --keep ({keep}); leave it out for the default 5/9·keep²"
    )]
    Alpha {
        /// The value given.
        got: f64,
        /// The share kept, the upper limit.
        keep: f64,
    },
    /// `--slope` outside [−1, 1], or not a number.
    #[error(
        "--slope {got}: expected a number from -1 to 1 (0: as many whole experts in every layer)"
    )]
    Slope {
        /// The value given.
        got: f64,
    },
    /// `--width-multiple` does not divide the expert width.
    #[error("--width-multiple {got} does not divide the expert width {width}; divisors: {}", join(.divisors))]
    WidthMultiple {
        /// The value given.
        got: usize,
        /// Expert width K.
        width: usize,
        /// Every divisor of K, ascending.
        divisors: Vec<usize>,
    },
    /// `--lambda` with a negative value, or with nothing but zeros.
    #[error("--lambda {},{},{}: expected three numbers of at least 0, not all 0, such as 0,0.5,0.5", got[0], got[1], got[2])]
    Lambda {
        /// The values given.
        got: [f64; 3],
    },
    /// `--threshold` outside [0, Σλ).
    #[error(
        "--threshold {got}: expected a similarity of at least 0 and below {largest}, the largest with these --lambda"
    )]
    Threshold {
        /// The value given.
        got: f64,
        /// Σλ.
        largest: f64,
    },
    /// `--experts` that this model's router cannot choose from.
    #[error("--experts {got}: {problem}; possible here: {}", join(.possible))]
    Experts {
        /// The count given.
        got: usize,
        /// Why it cannot be.
        problem: String,
        /// Counts that are possible.
        possible: Vec<usize>,
    },
    /// `--experts` with a number of counts that is not that of the layers.
    #[error(
        "--experts lists {got} counts; expected one for all layers, or one for each of the {expected} MoE layers"
    )]
    ExpertLayers {
        /// MoE layers of the model.
        expected: usize,
        /// Counts given.
        got: usize,
    },
    /// An option that the chosen method or allocation does not look at.
    #[error(
        "{option} has no effect with {with}; it needs {needs}: leave it out or change the method"
    )]
    NoEffect {
        /// The option, as spelt on the command line.
        option: &'static str,
        /// Method and allocation chosen.
        with: String,
        /// What the option works with.
        needs: &'static str,
    },
    /// The sensitivity allocation without the errors it rests on, or with those of another model or width multiple.
    #[error("--allocation sensitivity: {why}")]
    Curves {
        /// What is wrong, and what helps.
        why: &'static str,
    },
    /// A widths file with the wrong number of layers.
    #[error("the widths file has {got} layers, the model has {expected} MoE layers")]
    WidthLayers {
        /// MoE layers of the model.
        expected: usize,
        /// Layers in the file.
        got: usize,
    },
    /// A widths file whose layer has the wrong number of experts.
    #[error(
        "the widths file has {got} widths for layer {layer}, expected one for each of {expected} experts"
    )]
    WidthExperts {
        /// The model's own layer index.
        layer: usize,
        /// Routed experts N.
        expected: usize,
        /// Widths given.
        got: usize,
    },
    /// A widths file that asks for more neurons than there are.
    #[error(
        "the widths file gives layer {layer}, expert {expert} width {got}; expected at most {expected}"
    )]
    WidthTooLarge {
        /// The model's own layer index.
        layer: usize,
        /// Expert id.
        expert: usize,
        /// Expert width K.
        expected: usize,
        /// Width given.
        got: usize,
    },
    /// The budget rounds to no neuron at all.
    #[error(
        "--keep {keep} leaves no neuron at a width multiple of {quantum}; \
         keep more, or choose a smaller --width-multiple"
    )]
    EmptyBudget {
        /// Share kept.
        keep: f64,
        /// Width multiple q.
        quantum: usize,
    },
    /// The experts that must stay whole alone exceed the budget.
    #[error(
        "the {guarded} super experts and the whole experts beside them need {needed} neurons, the budget is {budget}; \
         keep more, lower --alpha, or leave out --protect-super"
    )]
    GuardedOverBudget {
        /// Guarded experts of the whole model.
        guarded: usize,
        /// Neurons that whole experts need.
        needed: usize,
        /// Neurons to keep in all.
        budget: usize,
    },
    /// More guarded experts in a layer (or router group) than may stay.
    #[error(
        "layer {layer}: super expert {expert} would be dropped with {kept} experts kept per layer; \
         keep more, or leave out --protect-super"
    )]
    GuardedDropped {
        /// The model's own layer index.
        layer: usize,
        /// The guarded expert left out.
        expert: usize,
        /// Experts kept in every layer.
        kept: usize,
    },
    /// No number of kept experts lets the router choose its top-k.
    #[error(
        "the router cannot choose {top_k} of {num_experts} experts in {num_groups} groups, {top_groups} in play, \
         with at least {minimum} per group; these experts cannot be dropped: use a method that narrows them"
    )]
    TopKUnreachable {
        /// Experts chosen per token.
        top_k: usize,
        /// Routed experts N.
        num_experts: usize,
        /// Router groups (1 without group-limited routing).
        num_groups: usize,
        /// Groups in play for a token.
        top_groups: usize,
        /// Experts that a group must keep.
        minimum: usize,
    },
    /// A model without routed experts.
    #[error(
        "nothing to prune: {num_layers} MoE layers with {num_experts} experts of width {width}; \
         expected a Mixture-of-Experts model"
    )]
    NothingToPrune {
        /// MoE layers L.
        num_layers: usize,
        /// Routed experts N.
        num_experts: usize,
        /// Expert width K.
        width: usize,
    },
    /// The checkpoint has been pruned before.
    #[error(
        "the checkpoint is already pruned (its config lists a width per expert); plan from the original instead"
    )]
    AlreadyPruned,
    /// Statistics of another checkpoint.
    #[error(
        "the statistics are of checkpoint {got}, the model is {expected}; calibrate this model, or name the other one"
    )]
    Fingerprint {
        /// Fingerprint of the checkpoint to be pruned.
        expected: String,
        /// Fingerprint in the statistics.
        got: String,
    },
    /// No statistics to decide from.
    #[error(
        "the statistics have no domain with a weight above 0 (domains: {known}); calibrate, or raise a weight"
    )]
    NoDomain {
        /// Domains of the statistics, comma-separated.
        known: String,
    },
    /// A weight for a domain that was not calibrated.
    #[error("there is no domain `{domain}` in the statistics; domains: {known}")]
    UnknownDomain {
        /// Domain named.
        domain: String,
        /// Domains of the statistics, comma-separated.
        known: String,
    },
    /// A domain weight that is negative or not finite.
    #[error("domain `{domain}` has weight {got}; expected a finite number of at least 0")]
    DomainWeight {
        /// Domain named.
        domain: String,
        /// Weight given.
        got: f64,
    },
    /// The statistics lack an MoE layer of the model.
    #[error(
        "the statistics of domain `{domain}` lack layer {layer}; calibrate the whole model again"
    )]
    MissingLayer {
        /// Domain.
        domain: String,
        /// The model's own layer index.
        layer: usize,
    },
    /// A layer of the statistics has another shape than the model's.
    #[error(
        "statistics of domain `{domain}`, layer {layer}: {what} is {got}, the model needs {expected}; \
         calibrate this model again"
    )]
    StatisticShape {
        /// Domain.
        domain: String,
        /// The model's own layer index.
        layer: usize,
        /// `num_experts`, `width`, or the statistic whose length is wrong.
        what: &'static str,
        /// Value or length needed.
        expected: usize,
        /// Value or length found.
        got: usize,
    },
    /// A value that no calibration can produce: NaN, infinite, or a negative count.
    #[error(
        "statistics of domain `{domain}`, layer {layer}, expert {expert}: {statistic} is {got}, \
         expected a finite number (a count: at least 0); check the weights for NaN and calibrate again"
    )]
    StatisticValue {
        /// Domain.
        domain: String,
        /// The model's own layer index.
        layer: usize,
        /// Expert id.
        expert: usize,
        /// Name of the statistic.
        statistic: &'static str,
        /// The value.
        got: f64,
    },
}

fn join(numbers: &[usize]) -> String {
    let texts: Vec<String> = numbers.iter().map(ToString::to_string).collect();
    texts.join(", ")
}
