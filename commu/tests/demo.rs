//! What the tutorial shows in 五、进程间通信. A change of `main` needs a change here.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

const COMMU: &str = env!(concat!("CARGO_BIN_EXE_", env!("CARGO_PKG_NAME")));

/// The twenty-four sleeps of eight runs add up to less than 2.3 seconds once in 10^15 times.
#[test]
fn values_go_in_order_from_one_process_to_another_with_sleeps() {
    let runs = [(); 8].map(|()| {
        thread::spawn(|| {
            let begin = Instant::now();
            run(false);
            begin.elapsed().as_secs_f64()
        })
    });
    let seconds: f64 = runs.into_iter().map(|run| run.join().unwrap()).sum();
    assert!(seconds > 2.3, "eight runs took {seconds} seconds together");
}

#[test]
fn a_late_reader_gets_all_values() {
    run(true);
}

/// Runs the demo, and checks all that it prints. If `hold`, the reader is stopped until the
/// writer's three sleeps are over.
fn run(hold: bool) {
    let mut commu = Command::new(COMMU);
    let commu = commu.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut run = commu.spawn().unwrap();
    let (mut lines, mut holds) = (Vec::new(), Vec::new());
    for line in BufReader::new(run.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(reader) = line.strip_prefix("Process to read: ").filter(|_| hold) {
            let script = format!("kill -STOP {reader}; sleep 4; kill -CONT {reader}");
            holds.push(Command::new("/bin/sh").args(["-c", &script]).spawn());
        }
        lines.push(line);
    }
    for hold in holds {
        hold.unwrap().wait().unwrap();
    }
    let run = run.wait_with_output().unwrap();
    assert!(run.status.success() && run.stderr.is_empty(), "{run:?}");

    // Certain is the order of each process's lines, and that a value is got after it is put.
    let place = |line: &str| lines.iter().position(|l| l == line);
    let (written, read): (Vec<&str>, Vec<&str>) = lines
        .iter()
        .map(String::as_str)
        .partition(|line| line.starts_with("Process to write: ") || line.starts_with("Put "));
    let writer = written[0]
        .strip_prefix("Process to write: ")
        .expect("a writer");
    let reader = read[0].strip_prefix("Process to read: ").expect("a reader");
    assert_ne!(writer, reader, "one process writes and reads");
    let values = ["A", "B", "C"];
    assert_eq!(written[1..], values.map(|v| format!("Put {v} to queue...")));
    assert_eq!(read[1..], values.map(|v| format!("Get {v} from queue.")));
    for (put, get) in written.iter().zip(&read).skip(1) {
        assert!(
            place(put) < place(get),
            "a value is got before it is put: {lines:?}"
        );
    }
}
