"""What is kept on disk and found again: content keys, files and folders that appear whole, a shared cache."""

from massdpo.store.code import package_code, target_code
from massdpo.store.content import digest, file_digest, keyed_seed
from massdpo.store.files import mapping_in, plain_yaml, replacing, write_json, write_jsonl, write_text, writing
from massdpo.store.folders import (
    MANIFEST,
    Cache,
    build_folder,
    is_whole,
    locked,
    remove_unfinished,
    set_aside,
)
