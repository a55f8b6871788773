//! What the tutorial shows in 三、进程池. A change of `main` needs a change here.

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Of forty numbers from [0, 3), the longest and the shortest differ by less than 1 once in 10^17
/// times, and all add up to less than 19.8 once in 10^15 times. A run takes at least a quarter of
/// the sum of its five sleeps, since four workers sleep at once.
#[test]
fn five_tasks_are_done_once_each_and_sleep_for_random_times() {
    let runs = [(); 8].map(|()| {
        thread::spawn(|| {
            let begin = Instant::now();
            let mut run = start();
            let lines: Vec<String> = read(&mut run).into_iter().collect();
            let times = end(run, &lines);
            (times, begin.elapsed().as_secs_f64())
        })
    });
    let (mut times, mut seconds) = (Vec::new(), 0.0);
    for run in runs {
        let run = run.join().unwrap();
        times.extend(run.0);
        seconds += run.1;
    }
    let longest = times.iter().copied().fold(0.0, f64::max);
    let shortest = times.iter().copied().fold(3.0, f64::min);
    assert!(longest - shortest > 1.0, "not random: {times:?}");
    assert!(seconds > 19.8 / 4.0, "eight runs took {seconds} seconds");
}

/// Stops each worker in its first task, and continues all of them after more than three seconds, so
/// that a task that measures its time prints more than 3.
///
/// A run proves nothing if a worker got no task before all were begun, or if no task had read the
/// clock before its worker was stopped. Then the test makes another run.
#[test]
fn four_workers_measure_the_time_of_their_tasks() {
    for _ in 0..20 {
        let mut run = start();
        let lines = read(&mut run);
        let (mut printed, mut begun) = (Vec::new(), Vec::new());
        let mut stopped = HashSet::new();
        while stopped.len() < 4 && begun.len() < 5 {
            // With fewer than four workers, no line comes any more.
            let Ok(line) = lines.recv_timeout(Duration::from_secs(10)) else {
                break;
            };
            if let Some(worker) = worker(&line) {
                thread::sleep(Duration::from_millis(10));
                signal("STOP", worker);
                stopped.insert(worker.to_string());
                begun.push(line.clone());
            }
            printed.push(line);
        }
        thread::sleep(Duration::from_millis(3_100));
        stopped.iter().for_each(|worker| signal("CONT", worker));
        printed.extend(lines);
        let times = end(run, &printed);
        if stopped.len() == 4 && times.iter().any(|&time| time > 3.0) {
            return;
        }
    }
    panic!("there are fewer than four workers, or no task measures its time");
}

fn start() -> Child {
    let mut propool = Command::new(env!("CARGO_BIN_EXE_propool"));
    let propool = propool.stdout(Stdio::piped()).stderr(Stdio::piped());
    propool.spawn().unwrap()
}

/// The lines that the run prints, one after the other.
fn read(run: &mut Child) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel();
    let stdout = BufReader::new(run.stdout.take().unwrap());
    thread::spawn(move || {
        stdout
            .lines()
            .try_for_each(|line| sender.send(line.unwrap()))
    });
    lines
}

/// The process id in a line that says which task a worker runs.
fn worker(line: &str) -> Option<&str> {
    line.strip_prefix("Run task ")?.split(['(', ')']).nth(1)
}

/// Sends a signal, unless the process has ended by now.
fn signal(name: &str, process: &str) {
    let kill = format!("kill -{name} {process}");
    let mut sh = Command::new("/bin/sh");
    sh.args(["-c", &kill]).output().unwrap();
}

/// Waits for the run to end, and checks all that it has printed. Returns the tasks' times.
fn end(run: Child, lines: &[String]) -> Vec<f64> {
    let run = run.wait_with_output().unwrap();
    assert!(run.status.success() && run.stderr.is_empty(), "{run:?}");
    assert_eq!(lines.len(), 13, "not thirteen lines: {lines:?}");
    let parent = lines[0].strip_prefix("Parent process ").unwrap();
    let parent = parent.strip_suffix(".").unwrap();
    assert!(lines.contains(&"Waiting for all subprocesses done...".to_string()));
    assert_eq!(lines[12], "All subprocesses done.");

    let (mut workers, mut times) = (HashSet::new(), Vec::new());
    for task in 0..5 {
        let place = |begin: &str| lines.iter().position(|line| line.starts_with(begin));
        let run = place(&format!("Run task {task} (")).expect("a task that is run");
        let runs = format!("Task {task} runs ");
        let end = place(&runs).expect("a task that ends");
        assert!(run < end, "task {task} ends before it is run: {lines:?}");
        workers.insert(worker(&lines[run]).unwrap());

        let time = lines[end][runs.len()..].strip_suffix(" seconds.").unwrap();
        assert_eq!(time.find('.'), Some(time.len() - 3), "not %0.2f: {time}");
        times.push(time.parse().unwrap());
    }
    assert!(workers.len() <= 4, "more than four workers: {lines:?}");
    assert!(!workers.contains(parent), "a task in the parent: {lines:?}");
    times
}
