//! What the tutorial shows in 五、进程间通信. A change of `main` needs a change here.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The twenty-four sleeps of eight runs add up to less than 2.3 seconds once in 10^15 times.
#[test]
fn values_go_in_order_from_one_process_to_another_with_sleeps() {
    let runs = [(); 8].map(|()| {
        thread::spawn(|| {
            let begin = Instant::now();
            end(start(), String::new());
            begin.elapsed().as_secs_f64()
        })
    });
    let seconds: f64 = runs.into_iter().map(|run| run.join().unwrap()).sum();
    assert!(seconds > 2.3, "eight runs took {seconds} seconds together");
}

/// The reader is stopped until the writer's three sleeps are over.
#[test]
fn a_late_reader_gets_all_values() {
    let mut run = start();
    let mut stdout = BufReader::new(run.stdout.take().unwrap());
    let mut output = String::new();
    let reader = loop {
        let begin = output.len();
        assert_ne!(stdout.read_line(&mut output).unwrap(), 0, "{output}");
        if let Some(reader) = output[begin..].strip_prefix("Process to read: ") {
            break reader.trim_end().to_string();
        }
    };
    signal("STOP", &reader);
    thread::sleep(Duration::from_secs(4));
    signal("CONT", &reader);
    stdout.read_to_string(&mut output).unwrap();
    end(run, output);
}

fn start() -> Child {
    let mut commu = Command::new(env!("CARGO_BIN_EXE_commu"));
    let commu = commu.stdout(Stdio::piped()).stderr(Stdio::piped());
    commu.spawn().unwrap()
}

/// Sends a signal, unless the process has ended by now.
fn signal(name: &str, process: &str) {
    let kill = format!("kill -{name} {process}");
    let mut sh = Command::new("/bin/sh");
    sh.args(["-c", &kill]).output().unwrap();
}

/// Waits for the run to end, and checks all that it has printed.
fn end(run: Child, mut output: String) {
    let run = run.wait_with_output().unwrap();
    assert!(run.status.success() && run.stderr.is_empty(), "{run:?}");
    output += std::str::from_utf8(&run.stdout).unwrap();

    // The two processes print at the same time, so only the order of each one's lines is certain.
    let (written, read): (Vec<&str>, Vec<&str>) = output
        .lines()
        .partition(|line| line.starts_with("Process to write: ") || line.starts_with("Put "));
    let writer = written[0]
        .strip_prefix("Process to write: ")
        .expect(&output);
    let reader = read[0].strip_prefix("Process to read: ").expect(&output);
    assert_ne!(writer, reader, "one process writes and reads: {output}");
    let values = ["A", "B", "C"];
    assert_eq!(written[1..], values.map(|v| format!("Put {v} to queue...")));
    assert_eq!(read[1..], values.map(|v| format!("Get {v} from queue.")));

    // No value is there before it is put.
    for (put, get) in written.iter().zip(&read).skip(1) {
        assert!(output.find(put) < output.find(get), "{output}");
    }
}
