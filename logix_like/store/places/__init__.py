"""Where the bytes of a store lie: files and folders of a disk, objects of an object storage, and who may touch them."""
