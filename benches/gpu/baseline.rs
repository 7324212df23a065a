//! The same products by cuBLAS.

use half::bf16;
use tenp_kernels::KernelError;
use tenp_kernels::cost::MoeWork;
use tenp_kernels::device::moe_group::{GatherRows, gather_rows};
use tenp_kernels::device::{
    DenseShape, Device, DeviceBuffer, GroupedDense, GroupedProduct, Runner as _, WeightLayout,
};

use super::layer::Layer;
use super::{Measure, Weights};

/// Both products of every expert through cuBLAS: gate and up as one, over the same weights that our kernels read.
pub(super) struct Baseline {
    gathered: DeviceBuffer<bf16>,
    gate_up_out: DeviceBuffer<bf16>,
    y: DeviceBuffer<bf16>,
    gate_up: Vec<GroupedProduct>,
    down: Vec<GroupedProduct>,
}

impl Baseline {
    pub(super) fn new(
        layer: &Layer<'_, Device>,
        work: &MoeWork,
        device: &Device,
    ) -> Result<Self, KernelError> {
        let (shape, pitch, rows) = (
            layer.case.shape,
            layer.layout.hidden_pitch(),
            layer.num_rows(),
        );
        let mut gathered = device.alloc::<bf16>("gathered tokens", rows * shape.hidden)?;
        let ids = device.upload("tokens of rows", &layer.tokens_of_rows()?)?;
        let args = GatherRows {
            input: layer.x[0].view(),
            row_ids: ids.view(),
            out: gathered.view_mut(),
            num_live_rows: None,
            input_rows: layer.case.tokens,
            rows,
            cols: shape.hidden,
        };
        // SAFETY: the ids are tokens.
        device.run(&unsafe { gather_rows(args) }?)?;
        let (mut gate_up, mut down, mut first) = (Vec::new(), Vec::new(), 0);
        for (e, expert) in work.experts.iter().enumerate() {
            let (range, rows) = (layer.layout.range(e), expert.rows);
            let padded = range.len();
            let live = if padded == 0 { 0 } else { rows };
            gate_up.push(GroupedProduct {
                shape: DenseShape {
                    out_pitch: 2 * pitch,
                    ..DenseShape::new(live, shape.hidden, 2 * padded)
                },
                x: first * shape.hidden,
                weight: 2 * range.start * shape.hidden,
                out: first * 2 * pitch,
            });
            down.push(GroupedProduct {
                shape: DenseShape {
                    x_pitch: pitch,
                    weight_pitch: shape.hidden,
                    layout: WeightLayout::InnerRows,
                    ..DenseShape::new(live, padded, shape.hidden)
                },
                x: first * pitch,
                weight: range.start * shape.hidden,
                out: first * shape.hidden,
            });
            first += rows;
        }
        Ok(Self {
            gathered,
            gate_up_out: device.alloc("gate and up", rows * 2 * pitch)?,
            y: device.alloc("y", rows * shape.hidden)?,
            gate_up,
            down,
        })
    }

    /// Seconds of a product after another, and of the library's grouped products.
    pub(super) fn times(
        &mut self,
        (device, weights): (&Device, &Weights<Device>),
        h: &DeviceBuffer<bf16>,
        flops: f64,
        measure: &Measure<'_>,
    ) -> Result<[f64; 2], KernelError> {
        let one_by_one = measure("cuBLAS loop", flops, &mut |set| {
            let operands = (&weights.gate_up[set], &weights.down_t[set], h);
            self.one_by_one(device, operands)
        })?;
        let calls = self.grouped(device, weights, h)?;
        let grouped = measure("cuBLAS grouped", flops, &mut |set| {
            // SAFETY: all buffers outlive the measurement, which waits for its end; nothing else writes to the outputs.
            calls[set]
                .iter()
                .try_for_each(|call| unsafe { call.run(device) })
        })?;
        Ok([one_by_one, grouped])
    }

    /// A product after another.
    fn one_by_one(
        &mut self,
        device: &Device,
        (gate_up, down_t, h): (
            &DeviceBuffer<bf16>,
            &DeviceBuffer<bf16>,
            &DeviceBuffer<bf16>,
        ),
    ) -> Result<(), KernelError> {
        for (products, x, weight, out) in [
            (
                &self.gate_up,
                &self.gathered,
                gate_up,
                &mut self.gate_up_out,
            ),
            (&self.down, h, down_t, &mut self.y),
        ] {
            for p in products.iter().filter(|p| p.shape.rows > 0) {
                let [x_len, weight_len, out_len] = p.shape.extents()?;
                let x = x.view().slice(p.x..p.x + x_len)?;
                let weight = weight.view().slice(p.weight..p.weight + weight_len)?;
                let out = out.view_mut().slice(p.out..p.out + out_len)?;
                device.dense(&p.shape, x, weight, out)?;
            }
        }
        Ok(())
    }

    /// The same in two library calls, prepared for every set of weights.
    fn grouped(
        &mut self,
        device: &Device,
        weights: &Weights<Device>,
        h: &DeviceBuffer<bf16>,
    ) -> Result<Vec<[GroupedDense; 2]>, KernelError> {
        let sets = weights.gate_up.iter().zip(&weights.down_t);
        sets.map(|(gate_up, down_t)| {
            let (x, weight) = (self.gathered.view(), gate_up.view());
            let mut out = self.gate_up_out.view_mut();
            let first = GroupedDense::new(device, &self.gate_up, x, weight, &mut out)?;
            let mut out = self.y.view_mut();
            let second = GroupedDense::new(device, &self.down, h.view(), down_t.view(), &mut out)?;
            Ok([first, second])
        })
        .collect()
    }
}
