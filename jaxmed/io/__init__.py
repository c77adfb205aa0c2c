"""Readers and writers of files: volumes, images, tables, DICOM series and published weights."""
