"""Command line: quickstart, doctor, captions, transfer-report, label, publish."""

from __future__ import annotations

import fire

from med3dinsight_ext.doctor import doctor
from med3dinsight_ext.monailabel.label_bundle import label_bundle
from med3dinsight_ext.monailabel.server import install, label
from med3dinsight_ext.publishing.export import export
from med3dinsight_ext.publishing.publish import publish, push
from med3dinsight_ext.publishing.verify import verify
from med3dinsight_ext.quickstart import quickstart
from med3dinsight_ext.reports.caption_page import captions
from med3dinsight_ext.training.transfer import transfer_report

if __name__ == "__main__":
    fire.Fire(
        {
            "quickstart": quickstart,
            "doctor": doctor,
            "captions": captions,
            "transfer-report": transfer_report,
            "label": label,
            "label-install": install,
            "label-bundle": label_bundle,
            "publish": publish,
            "verify": verify,
            "export": export,
            "push": push,
        }
    )
