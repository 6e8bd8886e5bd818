#!/usr/bin/env bash
# Makes the user that the container runs as, and its working directory; images may have a user of that number already.
#   create_user.sh USER_ID
set -euo pipefail

user_id=$1
if [[ ! $user_id =~ ^[1-9][0-9]{0,8}$ ]]; then
    echo "create_user: USER_ID '$user_id' must be a positive number: the container does not run as root" >&2
    exit 2
fi
if ! getent passwd "$user_id" >/dev/null; then
    useradd --create-home --uid "$user_id" --shell /bin/bash attn2d
fi
install -d -o "$user_id" "${WORKDIR_ROOT:-/workspace}/run"
