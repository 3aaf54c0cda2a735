use super::*;

fn open(path: &Path, logged: &Logged) -> (Ledger, Losses) {
    let (ledger, losses, error) = Ledger::open(path, logged);
    assert!(error.is_none(), "{error:?}");
    (ledger, losses)
}

fn logged(run: u64, settled: u64) -> Logged {
    Logged {
        run: Some(run),
        settled,
        ..Logged::default()
    }
}

fn counts(losses: &Losses) -> (Loss, Loss) {
    (losses.records, losses.connections)
}

#[test]
fn what_a_killed_run_left_is_counted_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("ledger");
    let (ledger, losses) = open(&path, &Logged::default());
    assert_eq!(counts(&losses), (Loss::Count(0), Loss::Count(0)));
    let first = ledger.run();
    for _ in 0..10 {
        ledger.opened();
        ledger.accept();
    }
    ledger.closed();
    ledger.accept_closed();
    ledger.set_reported(3, 7);
    ledger.set_last(40);
    drop(ledger);
    // 11 were accepted, 5 are in the log; 8 connections were open.
    let (ledger, losses) = open(&path, &logged(first, 5));
    assert_eq!(counts(&losses), (Loss::Count(6), Loss::Count(8)));
    assert_eq!((losses.last, ledger.reported(3)), (40, 7));
    // Killed again before the log has a word of that run, which accepted some more.
    ledger.accept();
    ledger.opened();
    drop(ledger);
    let (ledger, losses) = open(&path, &logged(first, 5));
    assert_eq!(counts(&losses), (Loss::Count(7), Loss::Count(9)));
    // Part of what it says reached the log before it was killed.
    let third = ledger.run();
    drop(ledger);
    let said = Logged {
        connections: 9,
        ..logged(first, 12)
    };
    let (ledger, losses) = open(&path, &said);
    assert_eq!(counts(&losses), (Loss::Count(0), Loss::Count(0)));
    assert_ne!(third, ledger.run());
    // All is said: a run of its own.
    let (_, losses) = open(&path, &logged(ledger.run(), 0));
    assert_eq!(counts(&losses), (Loss::Count(0), Loss::Count(0)));
}

#[test]
fn what_cannot_be_known_is_not_invented() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("ledger");
    let unknown = (Loss::Unknown, Loss::Unknown);
    let none = (Loss::Count(0), Loss::Count(0));
    let closed = Logged {
        closed: true,
        ..logged(5, 100)
    };
    let found = |bytes: Option<&[u8]>, logged: &Logged| {
        let _absent = std::fs::remove_file(&path);
        if let Some(bytes) = bytes {
            std::fs::write(&path, bytes).expect("written");
        }
        counts(&open(&path, logged).1)
    };
    assert_eq!(found(None, &logged(5, 100)), unknown);
    assert_eq!(found(None, &closed), none);
    assert_eq!(found(Some(b"garbage"), &Logged::default()), unknown);
    assert_eq!(found(Some(&[0; PAGE]), &closed), unknown);
    let (ledger, _) = open(&path, &Logged::default());
    let (run, page) = (ledger.run(), std::fs::read(&path).expect("read"));
    assert_eq!(found(Some(&page), &logged(run, 0)), none);
    // Of another log; older than the log; of another boot.
    assert_eq!(found(Some(&page), &logged(run + 1, 0)), unknown);
    assert_eq!(found(Some(&page), &logged(run, 1)), unknown);
    let mut other = Page::parse(&page).expect("a page");
    other.0[at::BOOT] ^= 1;
    other.0[at::CHECK] = other.check();
    assert_eq!(found(Some(&other.bytes()), &logged(run, 0)), unknown);
    let closed = Logged {
        closed: true,
        ..logged(run, 50)
    };
    assert_eq!(found(Some(&other.bytes()), &closed), none);
    let mut flipped = page;
    flipped[at::RUN * 8] ^= 1;
    assert_eq!(found(Some(&flipped), &logged(run, 0)), unknown);
}

#[test]
fn without_a_file_it_lives_in_memory() {
    let (ledger, _, error) = Ledger::open(Path::new("/nonexistent/ledger"), &Logged::default());
    assert!(error.is_some());
    ledger.accept();
    ledger.set_reported(KINDS - 1, 3);
    assert_eq!(ledger.reported(KINDS - 1), 3);
}
