//! Arguments that a kernel would read or write out of bounds with are refused before the launch, by name.

use half::bf16;
use tenp_kernels::KernelError;
use tenp_kernels::device::moe_down::{MoeDown, moe_down};
use tenp_kernels::device::rms_norm::{RmsNorm, rms_norm};
use tenp_kernels::device::{
    Backend, DenseShape, DeviceSlice, DeviceSliceMut, InOut, Memory as _, PaddedLayout, Product,
    Tile,
};

use super::batch::Batch;
use super::{On, Size};

pub fn bad_arguments_are_named<B: Backend>(on: On<'_, B>, _: Size) {
    tables();
    norm(on);
    product(on);
    let x = on.filled(bf16::ONE, 64);
    let mut out = on.filled(0f32, 64);
    let shape = DenseShape::new(8, 8, 9);
    let error = on.backend.dense(&shape, x.view(), x.view(), out.view_mut());
    assert!(matches!(
        error,
        Err(KernelError::Length { .. } | KernelError::Index { .. })
    ));
    let narrow = DenseShape {
        x_pitch: 7,
        ..DenseShape::new(8, 8, 8)
    };
    let error = on
        .backend
        .dense(&narrow, x.view(), x.view(), out.view_mut());
    assert!(
        matches!(error, Err(KernelError::Invalid { .. })),
        "{error:?}"
    );
}

fn tables() {
    let from = PaddedLayout::from_tables;
    assert!(matches!(
        from(vec![5, 5], vec![0, 16, 0]),
        Err(KernelError::NotMonotonic { index: 2, .. })
    ));
    assert!(matches!(
        from(vec![3, 17], vec![0, 16, 32]),
        Err(KernelError::TooWide {
            expert: 1,
            width: 17,
            padded: 16,
            ..
        })
    ));
    assert!(matches!(
        from(vec![5], vec![0]),
        Err(KernelError::Length { .. })
    ));
}

fn norm<B: Backend>(on: On<'_, B>) {
    let (x, weight) = (on.filled(1f32, 64), on.filled(1f32, 8));
    let mut out = on.filled(0f32, 64);
    let mut call = |x: DeviceSlice<'_, f32>, rows: usize| {
        let call = rms_norm(RmsNorm {
            x: InOut::Apart(x, None),
            addend: None,
            weight: weight.view(),
            out_f32: Some(out.view_mut()),
            out_bf16: None,
            eps: 1e-6,
            rows,
            width: 8,
            x_pitch: 8,
            out_pitch: 8,
        });
        call.map(|_| ())
    };
    assert_eq!(call(x.view(), 8), Ok(()));
    assert!(matches!(
        call(x.view(), 9),
        Err(KernelError::Length {
            expected: 72,
            got: 64,
            ..
        })
    ));
    // SAFETY: inside the buffer, and nothing is launched with it.
    let crooked = unsafe { DeviceSlice::<f32>::from_raw(x.view().address() + 2, 32) };
    assert!(matches!(
        call(crooked, 2),
        Err(KernelError::Misaligned { .. })
    ));
}

fn product<B: Backend>(on: On<'_, B>) {
    let batch = Batch::awkward(on, 1, 24, 3);
    let layer = &batch.layer;
    let tile = Tile::N64;
    let tiles = batch.tiles(Product::down(tile), Some(layer.hidden));
    let pitch = layer.hidden_pitch();
    let h = on.filled(bf16::ZERO, batch.num_rows() * pitch + 8);
    let mut y = on.filled(0f32, batch.num_rows() * layer.hidden);
    let mut call = |product: Product, h: DeviceSlice<'_, bf16>, hidden_pitch: usize| {
        let y: DeviceSliceMut<'_, f32> = y.view_mut();
        let call = moe_down(
            MoeDown {
                product,
                experts: batch.tables(),
                down_t: batch.down_t.view(),
                h,
                y_f32: Some(y),
                y_bf16: None,
                square_partials: None,
                group_offsets: batch.grouped.group_offsets.view(),
                schedule: tiles.view(),
                num_rows: batch.num_rows(),
                hidden: layer.hidden,
                hidden_pitch,
            },
            on.backend.multiprocessors(),
        );
        call.map(|_| ())
    };
    let product = Product::down(tile);
    assert_eq!(call(product, h.view(), pitch), Ok(()));
    assert!(matches!(
        call(product, h.view(), pitch - 16),
        Err(KernelError::Invalid { .. })
    ));
    assert!(matches!(
        call(Product::gate_up(tile), h.view(), pitch),
        Err(KernelError::Invalid { .. })
    ));
    let shifted = h.view().slice(1..h.view().len()).expect("inside");
    assert!(matches!(
        call(product, shifted, pitch),
        Err(KernelError::Misaligned { alignment: 16, .. })
    ));
    let short = h.view().slice(0..pitch).expect("inside");
    assert!(matches!(
        call(product, short, pitch),
        Err(KernelError::Length { .. })
    ));
}
