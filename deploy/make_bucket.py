"""Create the bucket of stores, with versions and a lifecycle; does nothing twice.

    AWS_ENDPOINT_URL=http://s3:8333 LOGITSTORE_BUCKET=logitstore python make_bucket.py

Objects of a store never change. Versions keep what a mistaken `rm` removed, for thirty days.
Uploads that were never finished, and the probes that ask whether the server honours conditional
writes, go away by themselves. Works with AWS as well: leave AWS_ENDPOINT_URL out.
"""

import os
import sys

import boto3
from botocore.exceptions import ClientError

LIFECYCLE = {
    "Rules": [
        {
            "ID": "removed-objects",
            "Status": "Enabled",
            "Filter": {"Prefix": ""},
            "NoncurrentVersionExpiration": {"NoncurrentDays": 30},
        },
        {
            "ID": "unfinished-uploads",
            "Status": "Enabled",
            "Filter": {"Prefix": ""},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7},
        },
    ]
}


def main() -> None:
    """Make the bucket that LOGITSTORE_BUCKET names."""
    bucket = os.environ["LOGITSTORE_BUCKET"]
    s3 = boto3.client("s3")
    try:
        s3.head_bucket(Bucket=bucket)
        print(f"bucket {bucket} is there")
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
        s3.create_bucket(Bucket=bucket, **_region(s3.meta.region_name))
        print(f"bucket {bucket} made")
    enabled = {"Status": "Enabled"}
    _set("versioning", s3.put_bucket_versioning, Bucket=bucket, VersioningConfiguration=enabled)
    _set(
        "lifecycle",
        s3.put_bucket_lifecycle_configuration,
        Bucket=bucket,
        LifecycleConfiguration=LIFECYCLE,
    )


def _region(region):
    # AWS wants its own region named, except for this one, which it refuses to see named.
    if "AWS_ENDPOINT_URL" in os.environ or region in (None, "us-east-1"):
        return {}
    return {"CreateBucketConfiguration": {"LocationConstraint": region}}


def _set(what, call, **arguments):
    """A server without this feature still keeps stores."""
    try:
        call(**arguments)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code not in ("NotImplemented", "MethodNotAllowed", "InvalidArgument", "MalformedXML"):
            raise
        print(f"{what}: the server does not take it ({code})", file=sys.stderr)
    else:
        print(f"{what} set")


if __name__ == "__main__":
    main()
