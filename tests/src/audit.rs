//! The audit log as it stands on disk, whatever wrote it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// All whole lines so far, oldest first. Where a file is there as it is and compressed, an
/// agent is about to remove the one.
pub fn audit_text(directory: &Path) -> Result<String> {
    // Compression may take a file away between two looks.
    for _ in 0..10 {
        if let Some(text) = look(directory)? {
            return Ok(text);
        }
    }
    anyhow::bail!("{} does not stand still", directory.display())
}

fn look(directory: &Path) -> Result<Option<String>> {
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("audit-") && (name.ends_with(".jsonl") || name.ends_with(".zst")) {
            files.push(entry.path());
        }
    }
    files.sort();
    let plain = |path: &Path| path.with_extension("");
    let twice: Vec<PathBuf> = files.iter().map(|p| plain(p)).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "zst") || !twice.contains(path));
    let mut text = Vec::new();
    for path in files {
        let Ok(bytes) = std::fs::read(&path) else {
            return Ok(None);
        };
        let bytes = match path.extension().is_some_and(|e| e == "zst") {
            true => zstd::decode_all(&bytes[..]).with_context(|| path.display().to_string())?,
            false => bytes,
        };
        text.extend(bytes);
    }
    let whole = text
        .iter()
        .rposition(|&b| b == b'\n')
        .map_or(0, |at| at + 1);
    text.truncate(whole);
    Ok(Some(String::from_utf8(text)?))
}

/// As [`audit_text`], a value a line.
pub fn audit_records(directory: &Path) -> Result<Vec<serde_json::Value>> {
    let text = audit_text(directory)?;
    let value = |line: &str| serde_json::from_str(line).context(line.to_owned());
    text.lines().map(value).collect()
}
