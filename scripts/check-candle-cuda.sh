#!/usr/bin/env bash
# Checks the types of the candle package's GPU side (examples/candle, feature cuda). candle compiles kernels of its own
# then, which takes minutes and which types do not depend on: an nvcc that writes empty files stands in for the compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${CARGO_TARGET_DIR:-examples/candle/target}")/empty-kernels
mkdir -p "$folder/bin"
cat > "$folder/bin/nvcc" <<'END'
#!/usr/bin/env bash
set -euo pipefail
while (($#)); do
  case $1 in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
    -o) : > "$2"; shift ;;
    --output-directory) into=$2; shift ;;
    *.cu) [[ -z ${into:-} ]] || : > "$into/$(basename "$1" .cu).ptx" ;;
  esac
  shift
done
END
chmod +x "$folder/bin/nvcc"
export NVCC=$folder/bin/nvcc TENP_NVCC=$folder/bin/nvcc CUDA_HOME=$folder CUDA_COMPUTE_CAP=90 PATH=$folder/bin:$PATH
cargo clippy --manifest-path examples/candle/Cargo.toml --locked --features cuda --target-dir "${folder%/*}" -- -D warnings
