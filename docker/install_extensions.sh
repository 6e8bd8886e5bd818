#!/usr/bin/env bash
# Builds Transformer Engine and Apex at the given revisions; an empty one keeps what the image has.
#   install_extensions.sh TRANSFORMER_ENGINE_REVISION APEX_REVISION ARCHITECTURES   (80;90)
set -euo pipefail

transformer_engine=$1 apex=$2 architectures=$3
for revision in "$transformer_engine" "$apex"; do
    if [[ ! $revision =~ ^([A-Za-z0-9][A-Za-z0-9._/-]*)?$ ]]; then
        echo "install_extensions: '$revision' is no tag, branch or commit" >&2
        exit 2
    fi
done

# No build isolation: compiled against the image's PyTorch and CUDA. No dependencies: they are the image's.
pip=(python3 -m pip install --no-cache-dir --no-build-isolation --no-deps)
if [[ $transformer_engine ]]; then
    NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=$architectures \
        "${pip[@]}" "git+https://github.com/NVIDIA/TransformerEngine.git@$transformer_engine"
fi
if [[ $apex ]]; then
    dotted=$(sed -E 's/([0-9])(;|$)/.\1\2/g' <<<"$architectures") # 80;90 -> 8.0;9.0
    TORCH_CUDA_ARCH_LIST=$dotted APEX_CPP_EXT=1 APEX_CUDA_EXT=1 \
        "${pip[@]}" "git+https://github.com/NVIDIA/apex.git@$apex"
fi
