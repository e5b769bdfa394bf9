"""Prints what the bundles pin, as requirements.

python docs/release/pins.py > pins.txt
"""

import json

from med3dinsight_ext.io.bundles import bundles_dir
from med3dinsight_ext.publishing.zoo import PINS

pins: dict[str, str] = {}
for path in bundles_dir().glob("*/configs/metadata.json"):
    metadata = json.loads(path.read_text())
    pins |= {name: metadata[key] for name, key in PINS.items()}
    pins |= metadata["required_packages_version"]
print(*(f"{name}=={version}" for name, version in sorted(pins.items())), sep="\n")
